"""Preference pairs: a better and a worse answer to one prompt, as two sequences that stand together in a stream.

Shape legend beside that of types.py:   S  sequences of a stream      P  pairs of a stream, S = 2 P, the chosen first"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.data.truncate import shorten
from tunery.types import Batch, Example, Message, Refused, Tokens

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]

# ---------------------------------------------------------------- examples to tokens


def encode_pairs(examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
    """Each example's [chosen, rejected], or why it cannot be used.

    Trained are the turns in which the two differ: the assistant turns of the prompt have weight 0, those of the answers
    their own (1 where it is None) and those of their spans. Each answer is exactly one sequence; one that the template
    can only write as several (it rewrites the earlier of several final turns) is refused. Where data.too_long is
    truncate, both keep the same prompt. A number in Example.meta["margin"] is put into both's Tokens.extra."""
    why = [_unfit(example) for example in examples]
    fit = [example for example, refused in zip(examples, why, strict=True) if refused is None]
    sides = template.encode_many([side for example in fit for side in _sides(example)])
    made = iter(
        _pair(example, better, worse, template)
        for example, better, worse in zip(fit, sides[0::2], sides[1::2], strict=True)
    )
    return [refused or next(made) for refused in why]


def prompt_length(example: Example) -> int:
    """How many messages stand before the chosen turns: as the data's format says (meta["shared"]), else those up to the
    last user's."""
    shared = example.meta.get("shared")
    if shared is not None:
        return int(shared)
    return max((i + 1 for i, message in enumerate(example.messages) if message.role == "user"), default=0)


def _unfit(example: Example) -> Refused | None:
    """Why a row is no pair."""
    if example.text is not None:
        return Refused("wrong objective", "the row is plain text; objective: pretrain trains it")
    rejected, chosen = example.rejected or [], example.messages[prompt_length(example) :]
    if why := _no_answer(rejected):
        return Refused("no rejected answer", why)
    if why := _no_answer(chosen):
        return Refused("no chosen answer", why)
    if other := next((turns[0].role for turns in (rejected, chosen) if turns[0].role != "assistant"), None):
        return Refused("different prompts", f"the sides differ in a turn of the role {other} before their answers")
    return None


def _no_answer(turns: Sequence[Message]) -> str | None:
    """Why one side of a pair is no answer. A reward model scores its last token, so that has to be an answer's."""
    if not any(message.role == "assistant" for message in turns):
        return "a preference pair has a chosen and a rejected answer to one prompt"
    return None if turns[-1].role == "assistant" else f"it ends with a turn of the role {turns[-1].role}"


def _sides(example: Example) -> tuple[Example, Example]:
    """The two conversations of a pair."""
    start = prompt_length(example)
    prompt = [replace(m, weight=0.0) if m.role == "assistant" else m for m in example.messages[:start]]
    better = replace(example, messages=prompt + example.messages[start:], rejected=None)
    return better, replace(example, messages=prompt + list(example.rejected or ()), rejected=None)


def _pair(
    example: Example, better: list[Tokens] | Refused, worse: list[Tokens] | Refused, template: Any
) -> list[Tokens] | Refused:
    if _was_cut(better) or _was_cut(worse):
        better, worse = _cut_together(example, template)
    for name, side in (("chosen", better), ("rejected", worse)):
        if isinstance(side, Refused):
            return Refused(side.reason, f"the {name} answer: {side.detail}" if side.detail else f"the {name} answer")
        if len(side) != 1:
            return Refused("answer in several sequences", f"the template rewrites earlier turns of the {name} answer")
    assert not isinstance(better, Refused) and not isinstance(worse, Refused)
    pair = [*better, *worse]
    if len(pair[0]) == len(pair[1]) and (pair[0].ids == pair[1].ids).all():
        return Refused("same answers", "chosen and rejected are the same tokens")
    margin = example.meta.get("margin")
    if margin is not None:
        for tokens in pair:
            tokens.extra["margin"] = float(margin)
    return pair


def without_spans(example: Example) -> Example:
    """The example without weights of parts of its answers (Message.spans)."""
    sides = (
        None if side is None else [replace(m, spans=()) if m.spans else m for m in side]
        for side in (example.messages, example.rejected)
    )
    messages, rejected = sides
    return replace(example, messages=messages or [], rejected=rejected)


def unused_spans(example: Example, objective: str) -> str | None:
    """What is to be said of a row with such weights, where an objective judges answers as a whole."""
    there = any(message.spans for message in [*example.messages, *(example.rejected or ())])
    return f"rows with weights of parts of an answer, which objective {objective} does not use" if there else None


# ---------------------------------------------------------------- pairs that are too long


def _was_cut(side: list[Tokens] | Refused) -> bool:
    return not isinstance(side, Refused) and any(tokens.extra.get("truncated") for tokens in side)


def _cut_together(example: Example, template: Any) -> tuple[list[Tokens] | Refused, list[Tokens] | Refused]:
    """Both sides cut to the template's max_length after one and the same prompt. What goes is what data/truncate.py
    says, until both fit; the answers lose their ends only where the shortest prompt does not make room for them."""
    sides = _sides(example)
    start, whole = prompt_length(example), template.unlimited

    def encoded(messages: list[Message]) -> list[Tokens] | Refused:
        return whole.encode_many([replace(example, messages=messages, rejected=None)])[0]

    def length(messages: list[Message]) -> float:
        made = encoded(messages)
        return float("inf") if isinstance(made, Refused) else max(map(len, made))

    def fits(messages: list[Message]) -> bool:
        return length(messages) <= template.max_length

    longer, other = sorted((side.messages for side in sides), key=length, reverse=True)
    tails = len(longer) - start, other[start:]

    def both_fit(messages: list[Message]) -> bool:
        return fits(messages) and fits(messages[: -tails[0]] + tails[1])

    cut = shorten(longer, both_fit)
    if cut is not None:
        made = {id(longer): cut, id(other): cut[: -tails[0]] + tails[1]}
    else:
        first = shorten(longer, fits)
        second = shorten(first[: -tails[0]] + tails[1], fits) if first is not None else None
        if first is None or second is None or first[: -tails[0]] != second[: -len(tails[1])]:
            refused = Refused("too long", f"{template.max_length} tokens cannot hold both answers after one prompt")
            return refused, refused
        made = {id(longer): first, id(other): second}
    results = tuple(encoded(made[id(side.messages)]) for side in sides)
    for result in results:
        for tokens in [] if isinstance(result, Refused) else result:
            tokens.extra["truncated"] = True
    return results[0], results[1]


# ---------------------------------------------------------------- streams of pairs


def count_pairs(batch: Batch) -> Tensor:
    """The pairs of a stream, a scalar: what an objective of pairs weighs a step by."""
    return torch.tensor(float(batch.n_sequences // 2))


def split_pairs(values_S: Tensor) -> tuple[Tensor, Tensor]:
    """A value of each sequence -> that of the chosen and of the rejected one of each pair: [P] and [P]."""
    chosen_P, rejected_P = values_S.view(-1, 2).unbind(1)
    return chosen_P, rejected_P


def sequence_logps(batch: Batch, logps_T: Tensor) -> Tensor:
    """log p of each answer given its prompt, [S]: the sum of its tokens', each times its weight."""
    return batch.per_sequence(logps_T * batch.weights_T)


def answer_lengths(batch: Batch) -> Tensor:
    """Trained tokens of each sequence, [S], to divide by."""
    return batch.labelled_S.clamp(min=1).to(torch.float32)


def without_length(batch: Batch, alpha: float) -> Tensor:
    """What each token's log p is multiplied by in LD-DPO (Liu et al., arXiv:2409.06411), [T]: 1 up to the length
    of the shorter answer of its pair, `alpha` beyond."""
    lengths_S = batch.labelled_S
    shared_S = lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    count = len(batch.labelled_N)
    first_S = lengths_S.cumsum(0) - lengths_S
    first_N, shared_N = (of.repeat_interleave(lengths_S, output_size=count) for of in (first_S, shared_S))
    place_N = torch.arange(count, device=lengths_S.device) - first_N
    factor_N = torch.where(place_N < shared_N, 1.0, alpha).to(batch.weights_T.dtype)
    return torch.ones_like(batch.weights_T).index_put((batch.labelled_N,), factor_N)


def smoothed(logits_P: Tensor, wrong: float) -> Tensor:
    """Cross-entropy of s(logits), the chance that the chosen answer is the better one, with labels of which the share
    `wrong` is the wrong way round: [P]."""
    return -(1 - wrong) * F.logsigmoid(logits_P) - wrong * F.logsigmoid(-logits_P)


def pair_metrics(
    chosen_rewards_P: Tensor, rejected_rewards_P: Tensor, chosen_logps_P: Tensor, rejected_logps_P: Tensor
) -> Metrics:
    """What the field reports of pairs, as (sum, pairs). Rewards are those of the objective (for DPO the beta-scaled
    log-ratios to the reference); a pair is right (accuracies) where the chosen one has the higher reward."""
    values = {
        "rewards/chosen": chosen_rewards_P,
        "rewards/rejected": rejected_rewards_P,
        "rewards/accuracies": (chosen_rewards_P > rejected_rewards_P).float(),
        "rewards/margins": chosen_rewards_P - rejected_rewards_P,
        "logps/chosen": chosen_logps_P,
        "logps/rejected": rejected_logps_P,
    }
    return {name: (value.detach().sum(), float(len(value))) for name, value in values.items()}
