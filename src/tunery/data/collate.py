"""Sequences to ONE packed, shifted stream. Boundaries are built here, once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunery.types import Batch, Tokens


def collate(sequences: Sequence[Tokens], rows: Sequence[int] = ()) -> Batch:
    """Pack whole sequences, in order, into a Batch. Position t predicts token t + 1 of its own sequence; the last
    position of each sequence predicts nothing (weight 0), so nothing leaks into a neighbour. Raises ValueError for
    no sequences or an empty one."""
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
        rows=list(rows),
    )
