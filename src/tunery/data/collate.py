"""Sequences to ONE packed, shifted stream. Boundaries are built here, once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunery.data.share import shared_length
from tunery.types import Batch, Tokens


def collate(sequences: Sequence[Tokens], rows: Sequence[int] = (), share: bool = False) -> Batch:
    """Pack whole sequences, in order, into a Batch. Position t predicts token t + 1 of its own sequence; the last
    position of each sequence predicts nothing (weight 0), so nothing leaks into a neighbour. What the sequences have in
    `extra` is carried along, beside `ids_T` (unshifted) or one value a sequence. Raises ValueError for no sequences, an
    empty one, or an extra that only some have.

    `share`: neighbours of one row that begin alike (the answers to one prompt) share that beginning, up to the token
    before the first that is trained. Each goes on from there with the last token of it, which predicts its own next."""
    if not sequences or any(len(tokens) == 0 for tokens in sequences):
        raise ValueError("a stream needs at least one sequence, and every sequence at least one token")
    extra = _extra(sequences)
    pieces = _pieces(sequences, rows) if share and len(rows) == len(sequences) else None
    if pieces is None:
        pieces = [Piece(number, 0, len(tokens)) for number, tokens in enumerate(sequences)]
    parts = [(sequences[piece.sequence], piece) for piece in pieces]
    lengths = [piece.end - piece.start for piece in pieces]
    ends = np.cumsum(lengths, dtype=np.int64)
    ids = np.concatenate([tokens.ids[piece.start : piece.end] for tokens, piece in parts]).astype(np.int64)
    weights = np.concatenate([tokens.weights[piece.start : piece.end] for tokens, piece in parts]).astype(np.float32)
    targets = np.roll(ids, -1)
    shifted = np.roll(weights, -1)
    targets[ends - 1] = 0
    shifted[ends - 1] = 0.0
    starts = np.array([piece.start for piece in pieces])
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(ends - lengths - starts, lengths)
    if len(pieces) > len(sequences):
        extra = _cut(extra, sequences, pieces)
    counts = np.add.reduceat(shifted != 0, ends - lengths, dtype=np.int64)
    shared = {piece.continues for piece in pieces} - {-1}
    return Batch(
        ids_T=torch.from_numpy(ids),
        targets_T=torch.from_numpy(targets),
        weights_T=torch.from_numpy(shifted),
        positions_T=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=max(lengths),
        labelled_N=torch.from_numpy(np.flatnonzero(shifted)),
        labelled_S=torch.from_numpy(counts[[number for number in range(len(pieces)) if number not in shared]]),
        lengths=lengths,
        continues=[piece.continues for piece in pieces] if shared else [],
        rows=list(rows),
        extra=extra,
    )


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of sequence `sequence`; `continues` as in Batch."""

    sequence: int
    start: int
    end: int
    continues: int = -1


def _pieces(sequences: Sequence[Tokens], rows: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for _, group in itertools.groupby(range(len(sequences)), key=lambda number: rows[number]):
        members = list(group)
        shared = shared_length([sequences[number] for number in members])
        before = -1
        if shared:
            before = len(pieces)
            pieces.append(Piece(members[0], 0, shared))
        pieces += [Piece(number, shared, len(sequences[number]), before) for number in members]
    return pieces


def _cut(extra: dict[str, torch.Tensor], sequences: Sequence[Tokens], pieces: Sequence[Piece]) -> dict[str, Any]:
    """Extras of each token, cut as the tokens are."""
    starts = np.cumsum([0, *map(len, sequences)])
    spans = [(int(starts[piece.sequence]) + piece.start, int(starts[piece.sequence]) + piece.end) for piece in pieces]
    of_tokens = {name for name in extra if isinstance(sequences[0].extra.get(name), np.ndarray)}
    return {
        name: torch.cat([value[start:end] for start, end in spans]) if name in of_tokens else value
        for name, value in extra.items()
    }


# Extras that a sequence may be without, and what it has then.
_DEFAULTS = {"truncated": False, "margin": 0.0}


def _extra(sequences: Sequence[Tokens]) -> dict[str, torch.Tensor]:
    """The sequences' extras: arrays as a tensor [T], numbers as a tensor [S]."""
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
