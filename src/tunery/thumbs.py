"""Answers with a thumb: up where an answer is wanted, down where it is not; no better and worse answer to one prompt is
needed. A preference pair is one of each.

Batch.extra["label"] is True for the wanted sequences, bool [S]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunery.pairs import encode_pairs, without_spans
from tunery.types import Batch, Example, Refused, Tokens

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]
LABEL = "label"


def encode_thumbs(examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
    """Each example's sequence, or a pair's two (the wanted one first), or why it cannot be used. Trained is the last
    assistant turn; of a pair, the turns in which the two differ. A thumb is for an answer as a whole, so weights of its
    parts are left out."""
    examples = [without_spans(example) for example in examples]
    pairs = [example for example in examples if example.rejected is not None]
    single = [example for example in examples if example.rejected is None]
    why = [_unfit(example) for example in single]
    fit = [replace(example, label=None) for example, refused in zip(single, why, strict=True) if refused is None]
    of_pairs = iter(encode_pairs(pairs, template) if pairs else [])
    of_fit = iter(template.encode_many(fit, train="last") if fit else [])
    of_single = iter([refused or next(of_fit) for refused in why])
    made = []
    for example in examples:
        if example.rejected is not None:
            made.append(_labelled(next(of_pairs), [True, False]))
        else:
            made.append(_labelled(next(of_single), [bool(example.label)]))
    return made


def _unfit(example: Example) -> Refused | None:
    if example.text is not None:
        return Refused("wrong objective", "the row is plain text; objective: pretrain trains it")
    if example.label is None:
        return Refused("no thumb", "the row has neither label (true or false; kto_tag) nor a rejected answer")
    return None


def _labelled(sequences: list[Tokens] | Refused, labels: list[bool]) -> list[Tokens] | Refused:
    if isinstance(sequences, Refused):
        return sequences
    if len(sequences) != len(labels):
        return Refused("answer in several sequences", "the template rewrites earlier turns of the answer")
    for tokens, label in zip(sequences, labels, strict=True):
        tokens.extra[LABEL] = label
    return sequences


def mismatched(examples: Sequence[list[Tokens]], longest: int | None = None) -> list[list[Tokens]]:
    """Each example's prompt with the (first) answer of the example before it, the first with that of the last; nothing
    where there are not two examples. Of a long prompt with a long answer, what is beyond `longest` tokens (and beyond
    the longest of these examples) is cut off: the model may have no positions there, and memory was planned for rows
    alone."""
    if len(examples) < 2:
        return []
    if longest is not None:
        longest = max(longest, *(len(sequences[0]) for sequences in examples))
    return [
        [_answered(mine[0], other[0], longest)]
        for mine, other in zip(examples, [examples[-1], *examples[:-1]], strict=True)
    ]


def _answered(mine: Tokens, other: Tokens, longest: int | None) -> Tokens:
    prompt, answer = mine.ids[: _begin(mine)], other.ids[_begin(other) :]
    weights = np.concatenate([np.zeros(len(prompt), np.float32), other.weights[_begin(other) :]])
    return Tokens(np.concatenate([prompt, answer])[:longest], weights[:longest])


def _begin(tokens: Tokens) -> int:
    """Where the answer begins: its first trained token."""
    return int(np.flatnonzero(tokens.weights[1:])[0]) + 1


def count_sequences(batch: Batch) -> Tensor:
    return torch.tensor(float(batch.n_sequences))


def thumb_metrics(rewards_S: Tensor, logps_S: Tensor, wanted_S: Tensor) -> Metrics:
    """Mean rewards and log-probs of the wanted and the unwanted answers, each as (sum, number). A thumb is right
    (accuracies) where the reward has its sign."""
    metrics: Metrics = {"rewards/accuracies": (((rewards_S > 0) == wanted_S).float().sum(), float(len(wanted_S)))}
    for name, chosen in (("chosen", wanted_S), ("rejected", ~wanted_S)):
        for what, values_S in (("rewards", rewards_S), ("logps", logps_S)):
            metrics[f"{what}/{name}"] = (torch.where(chosen, values_S.detach(), 0.0).sum(), chosen.sum())
    return metrics
