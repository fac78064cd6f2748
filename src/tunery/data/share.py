"""How much of an example's sequences is the same at their beginnings, so that it can be computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunery.types import Tokens

# Shared tokens from which computing them once is worth a piece of its own.
WORTH_SHARING = 8
_AT_ONCE = 1 << 22  # tokens compared at a time


def shared_length(sequences: Sequence[Tokens]) -> int:
    """Tokens that several sequences of an example have in common and can share; 0 where it is not worth it. The token
    that predicts the first trained one is not shared: each sequence has its own target there."""
    shared = common_length(sequences) - 1 if len(sequences) > 1 else 0
    return shared if shared >= WORTH_SHARING else 0


def common_length(sequences: Sequence[Tokens]) -> int:
    """Tokens that the sequences begin with alike, none of them trained on."""
    shortest = min(map(len, sequences))
    first = sequences[0].ids[:shortest]
    same: np.ndarray = np.logical_and.reduce([tokens.ids[:shortest] == first for tokens in sequences[1:]])
    trained: np.ndarray = np.logical_or.reduce([tokens.weights[:shortest] != 0 for tokens in sequences])
    trained[0] = False  # nothing predicts the first token
    differs = np.flatnonzero(~same | trained)
    return int(differs[0]) if len(differs) else shortest


def shared_lengths(
    ids: np.ndarray, weights: np.ndarray, sequence_offsets: np.ndarray, example_offsets: np.ndarray
) -> np.ndarray:
    """`shared_length` of every example of a store's flat arrays (data/store.py): int64 [E]."""
    shared = np.zeros(len(example_offsets) - 1, dtype=np.int64)
    counts = np.diff(example_offsets)
    several = np.flatnonzero(counts > 1)
    tokens = np.diff(sequence_offsets[example_offsets])[several]
    blocks = np.split(several, np.flatnonzero(np.diff(np.cumsum(tokens) // _AT_ONCE)) + 1) if len(several) else []
    for examples in blocks:
        # each sequence of an example but the first, beside that first
        others = counts[examples] - 1
        begin = np.cumsum(others) - others
        first = np.repeat(example_offsets[examples], others)
        other = first + 1 + np.arange(len(first)) - np.repeat(begin, others)
        alike = _alike(ids, weights, sequence_offsets, first, other)
        shared[examples] = np.minimum.reduceat(alike, begin) - 1
    shared[shared < WORTH_SHARING] = 0
    return shared


def _alike(
    ids: np.ndarray, weights: np.ndarray, offsets: np.ndarray, first: np.ndarray, other: np.ndarray
) -> np.ndarray:
    """How many tokens sequence first[i] and sequence other[i] begin with that are the same and not trained."""
    lengths = np.minimum(offsets[first + 1] - offsets[first], offsets[other + 1] - offsets[other])
    begin = np.cumsum(lengths) - lengths
    place = np.arange(int(lengths.sum())) - np.repeat(begin, lengths)
    a, b = (place + np.repeat(offsets[which], lengths) for which in (first, other))
    ends = (ids[a] != ids[b]) | ((place > 0) & ((weights[a] != 0) | (weights[b] != 0)))
    return np.minimum.reduceat(np.where(ends, place, np.repeat(lengths, lengths)), begin)
