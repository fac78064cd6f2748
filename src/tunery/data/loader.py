"""What each optimizer step is made of: a pure function of (seed, step), cut for this rank and for memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tunery.data.collate import collate
from tunery.data.pack import best_fit_decreasing, partition
from tunery.types import Batch, Tokens


class Store(Protocol):
    """Tokenised examples held in memory or mapped from disk (data/store.py)."""

    @property
    def lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...
    def sequences(self, number: int, /) -> list[Tokens]: ...


class Stream(Protocol):
    """Tokenised examples read while training (data/stream.py)."""

    def forever(self, start: int) -> Iterator[tuple[list[Tokens], Any]]:
        """Examples from number `start` on, over epoch after epoch."""
        ...


@dataclass(frozen=True)
class Cut:
    """How a step is cut. None of it changes the result: `budget` tokens a stream, `packing` several examples in one,
    this `rank` of `world`."""

    budget: int
    packing: bool = True
    rank: int = 0
    world: int = 1


@dataclass
class Step:
    """One optimizer step: this rank's micro-batches, and the whole step's size over all ranks."""

    micro: list[Batch]
    examples: int
    tokens: int


def streams(lengths: Sequence[int], how: Cut) -> list[list[int]]:
    """Which of a step's examples, of these lengths, share each of this rank's streams. All ranks compute the same cut
    from the lengths alone."""
    mine = partition(lengths, how.world)[how.rank]
    if not how.packing:
        return [[i] for i in mine]
    bins = best_fit_decreasing([lengths[i] for i in mine], how.budget)
    return [[mine[j] for j in sorted(members)] for members in bins]


def cut(examples: Sequence[list[Tokens]], rows: Sequence[int], how: Cut) -> list[Batch]:
    """This rank's share of `examples` as streams."""
    return [
        collate([t for i in members for t in examples[i]], [rows[i] for i in members for _ in examples[i]])
        for members in streams([sum(len(t) for t in sequences) for sequences in examples], how)
    ]


def epoch_order(examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of the examples in an epoch: a pure function of (seed, epoch)."""
    if not shuffle:
        return np.arange(examples)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)


class Loader:
    """Steps over a store. Each epoch is a fresh order; its last step holds what is left, so no row is dropped."""

    def __init__(self, store: Store, *, batch_size: int, seed: int, shuffle: bool, how: Cut):
        self.store, self.batch_size, self.seed, self.shuffle, self.how = store, batch_size, seed, shuffle, how
        self.steps_per_epoch = math.ceil(len(store) / batch_size)
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of a step (0-based)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.store), self.seed, epoch, self.shuffle))
        start = within * self.batch_size
        return [int(i) for i in self._order[1][start : start + self.batch_size]]

    def step(self, step: int) -> Step:
        rows = self.rows(step)
        examples = [self.store.sequences(row) for row in rows]
        return Step(cut(examples, rows, self.how), len(rows), int(self.store.lengths[rows].sum()))

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs + min(1.0, within * self.batch_size / len(self.store))


class StreamLoader:
    """Steps over a stream. Steps must be asked for in order; asking for a later one first (a resume) skips ahead."""

    steps_per_epoch = None

    def __init__(self, stream: Stream, *, batch_size: int, how: Cut):
        self.stream, self.batch_size, self.how = stream, batch_size, how
        self._next = 0
        self._examples: Iterator[list[Tokens]] = self._from(0)

    def _from(self, start: int) -> Iterator[list[Tokens]]:
        return (sequences for sequences, _ in self.stream.forever(start))

    def step(self, step: int) -> Step:
        if step != self._next:
            self._examples = self._from(step * self.batch_size)
        self._next = step + 1
        examples = [next(self._examples) for _ in range(self.batch_size)]
        first = step * self.batch_size
        rows = list(range(first, first + len(examples)))
        return Step(cut(examples, rows, self.how), len(examples), sum(len(t) for e in examples for t in e))

    def epoch_at(self, step: int) -> float:
        return 0.0


def evaluation_streams(store: Store, how: Cut) -> Iterator[Batch]:
    """This rank's share of all examples, in streams, packed a window at a time so that little is held."""
    window = 1024
    for start in range(0, len(store), window):
        rows = list(range(start, min(start + window, len(store))))
        yield from cut([store.sequences(row) for row in rows], rows, how)
