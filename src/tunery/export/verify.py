"""Proof that an exported model is the one that was trained: the same logits on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunery.generate.hf import generating
from tunery.models.parts import scalar, take_apart

# Largest relative difference allowed, by the precision of the exported weights. Merging rounds each weight once: 2^-24
# of its size in float32, 2^-11 in float16, 2^-8 in bfloat16, and a forward in low precision rounds as coarsely again.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
STREAMS, LENGTH, SEED = 4, 48, 20240229


@dataclass(frozen=True, slots=True)
class Check:
    """`error`: root mean square of the difference over that of the logits around their mean, over all positions;
    `largest`: the largest absolute difference; `argmax`: share of positions whose likeliest token agrees (of a reward
    model, of streams whose best position does)."""

    error: float
    largest: float
    argmax: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def probes(vocabulary: int, extra: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Fixed token streams to compare on: seeded random tokens of the vocabulary, and `extra` (real prompts)."""
    random = np.random.default_rng(SEED)
    streams = [random.integers(0, vocabulary, LENGTH).tolist() for _ in range(STREAMS)]
    return streams + [list(ids[:512]) for ids in extra if ids]


@torch.no_grad()
def probe_logits(model: Any, streams: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each stream, float32 [T, V] on the CPU; of a model with a scalar head its values, [1, T]."""
    device = next(model.parameters()).device
    parts = take_apart(model)
    with generating(model):
        if parts is not None and parts.scalar:
            rows = [torch.tensor([list(ids)], device=device) for ids in streams]
            hidden = [parts.backbone(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]
            return [scalar(parts.head, h_TH)[None].float().cpu() for h_TH in hidden]
        return [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in streams]


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Check:
    """How far the logits `found` are from those `expected`; passed when within the tolerance of `dtype`."""
    squares = spread = agreed = largest = count = 0.0
    for a_TV, b_TV in zip(found, expected, strict=True):
        difference_TV = (a_TV - b_TV).double()
        squares += float(difference_TV.square().sum())
        spread += float((b_TV - b_TV.mean(-1, keepdim=True)).double().square().sum())
        # max() of a Tensor keeps NaN where Python's would lose it; so does the sum of squares above
        largest = float(torch.stack([difference_TV.abs().max(), torch.tensor(largest).double()]).max())
        agreed += float((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        count += len(a_TV)
    return Check(
        error=math.sqrt(squares / max(spread, 1e-24)) if math.isfinite(squares) else math.inf,
        largest=largest,
        argmax=agreed / count,
        tolerance=TOLERANCE[dtype],
    )
