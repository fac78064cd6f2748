"""Sequences to ONE packed, shifted stream. Boundaries are built here, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tunery.types import Batch, Tokens


def collate(sequences: Sequence[Tokens], rows: Sequence[int] = ()) -> Batch:
    """Pack whole sequences, in order, into a Batch. Position t predicts token t + 1 of its own sequence; the last
    position of each sequence predicts nothing (weight 0), so nothing leaks into a neighbour. What the sequences have in
    `extra` is carried along, beside `ids_T` (unshifted) or one value a sequence. Raises ValueError for no sequences, an
    empty one, or an extra that only some have."""
    if not sequences or any(len(tokens) == 0 for tokens in sequences):
        raise ValueError("a stream needs at least one sequence, and every sequence at least one token")
    lengths = [len(tokens) for tokens in sequences]
    ends = np.cumsum(lengths)
    ids = np.concatenate([tokens.ids for tokens in sequences]).astype(np.int64)
    weights = np.concatenate([tokens.weights for tokens in sequences]).astype(np.float32)
    targets = np.roll(ids, -1)
    shifted = np.roll(weights, -1)
    targets[ends - 1] = 0
    shifted[ends - 1] = 0.0
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return Batch(
        ids_T=torch.from_numpy(ids),
        targets_T=torch.from_numpy(targets),
        weights_T=torch.from_numpy(shifted),
        positions_T=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=max(lengths),
        labelled_N=torch.from_numpy(np.flatnonzero(shifted)),
        lengths=lengths,
        rows=list(rows),
        extra=_extra(sequences),
    )


# Extras that a sequence may be without, and what it has then.
_DEFAULTS = {"truncated": False}


def _extra(sequences: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """The sequences' extras: arrays as a tensor [T], numbers as a tensor [R]."""
    names = dict.fromkeys(name for tokens in sequences for name in tokens.extra)
    return {
        name: _joined(name, [t.extra.get(name, _DEFAULTS.get(name)) for t in sequences], sequences) for name in names
    }


def _joined(name: str, values: list[Any], sequences: Sequence[Tokens]) -> torch.Tensor:
    missing = sum(value is None for value in values)
    if missing:
        raise ValueError(f"Tokens.extra[{name!r}]: {missing} of the {len(values)} sequences in a stream do not have it")
    arrays = [isinstance(value, np.ndarray) and value.ndim == 1 for value in values]
    if all(arrays):
        if any(len(value) != len(tokens) for value, tokens in zip(values, sequences, strict=True)):
            raise ValueError(f"Tokens.extra[{name!r}]: an array must have one value for each token")
        return torch.from_numpy(np.concatenate(values))
    if any(arrays) or not all(isinstance(value, bool | int | float | np.generic) for value in values):
        raise ValueError(f"Tokens.extra[{name!r}]: must be an array [T] or a number, the same in all sequences")
    return torch.from_numpy(np.array(values))
