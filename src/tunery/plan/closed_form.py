"""A micro-batch by formula, for a model whose code does not run on shapes. Within a third or so; the plan says so."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tunery.flops import cost_of, flops_per_token
from tunery.kernels.linear_cross_entropy import CHUNK_LOGITS, FEWEST_ROWS
from tunery.memory import LOW, Profile, Span
from tunery.models.parts import score_head, unwrap
from tunery.plan.shadow import Shadow, Stream


def closed_form(shadow: Shadow, stream: Stream, rung: str, device: str, accumulates: bool) -> Profile:
    """Of each layer's token eager code keeps about 8 hidden + 4 q + 4 inner numbers (of a mixture of experts, inner for
    each expert chosen), on the rung selective half of that, on full the layer's input; of the head one chunk of logits
    three times over and the hidden states' gradient."""
    config = unwrap(shadow.model).config.get_text_config()
    width, tokens = shadow.dtype.itemsize, stream.tokens
    layer = tokens * width * kept_numbers(config)
    kept = {"none": layer, "selective": layer // 2}.get(rung, tokens * shadow.hidden_bytes)
    outputs = config.vocab_size if score_head(shadow.model) is None else 1
    logits = 3 * 4 * min(max(CHUNK_LOGITS[device], FEWEST_ROWS * outputs), stream.labelled * outputs)
    logits += stream.labelled * config.hidden_size * 4
    spans: dict[Any, Span] = {"embed": Span("embed", 0, 0, 0), "head": Span("head", 0, logits, 0)}
    for kind in range(len(shadow.kinds)):
        rise, gradients = layer // 2, 0 if accumulates else shadow.kinds[kind].gradients
        spans["forward", kind] = Span(("forward", kind), 0, kept + rise // 4, kept)
        spans["backward", kind] = Span(("backward", kind), kept, kept + rise, gradients)
    again = {"none": 0.0, "selective": 0.1}.get(rung, 1 / 3)
    mean = sum(n * n for n in stream.lengths) / tokens
    flops = flops_per_token(cost_of(shadow.model), labelled=stream.labelled / tokens, mean_length=mean)
    work = (shadow.dtype in LOW, round((1 + again) * tokens * flops), round(6 * layer * len(shadow.layers)))
    spans["embed"].work = Counter({work: 1})
    gradients = [shadow.kinds[kind].gradients for kind in shadow.layers]
    return Profile(spans, shadow.layers, gradients, shadow.gradient_bytes, accumulates)


def inner_size(config: Any) -> int:
    """Numbers between the two halves of an MLP; of the widest where layers differ (Gemma 3n)."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return inner if isinstance(inner, int) else max(inner)


def kept_numbers(config: Any) -> int:
    """Kept of one token in one layer by eager code."""
    hidden = config.hidden_size
    inner = getattr(config, "moe_intermediate_size", None) or inner_size(config)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    return 12 * hidden + 4 * inner * chosen
