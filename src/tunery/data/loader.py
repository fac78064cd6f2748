"""What each optimizer step is made of: the examples its order gives it, cut for this rank and for memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tunery.data.collate import collate
from tunery.data.order import Order
from tunery.data.pack import best_fit_decreasing, partition
from tunery.data.share import shared_length
from tunery.types import Batch, Tokens


class Store(Protocol):
    """Tokenised examples held in memory or mapped from disk (data/store.py)."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def lengths_when_shared(self) -> np.ndarray: ...

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
    this `rank` of `world`; `share`: what the sequences of an example begin with alike is there once (data/collate.py),
    and counts once."""

    budget: int
    packing: bool = True
    rank: int = 0
    world: int = 1
    share: bool = False


# Steps that are looked at for the largest stream, evenly spaced, where a run has more.
LOOKED_AT = 2000


@dataclass
class Step:
    """One optimizer step over all ranks: `examples`, each of one or more sequences, and the numbers of their `rows`;
    and `micro`, this rank's share of them as streams, cut as `how` says."""

    examples: Sequence[list[Tokens]]
    rows: list[int]
    how: Cut
    micro: list[Batch]

    @property
    def tokens(self) -> int:
        """Of all ranks."""
        return sum(len(tokens) for sequences in self.examples for tokens in sequences)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, which no cut takes apart."""
        return max(_length(sequences, self.how) for sequences in self.examples)

    @property
    def largest(self) -> int:
        """Tokens of this rank's largest stream; 0 without any."""
        return max((batch.n_tokens for batch in self.micro), default=0)

    def recut(self, how: Cut) -> Step:
        """The same examples cut in another way."""
        return self if how == self.how else make_step(self.examples, self.rows, how)


def make_step(examples: Sequence[list[Tokens]], rows: list[int], how: Cut) -> Step:
    return Step(examples, rows, how, cut(examples, rows, how))


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
    found = streams([_length(sequences, how) for sequences in examples], how)
    return [_one_stream([examples[i] for i in members], [rows[i] for i in members], how) for members in found]


def _length(sequences: Sequence[Tokens], how: Cut) -> int:
    """Tokens that an example takes in a stream."""
    twice = (len(sequences) - 1) * shared_length(sequences) if how.share else 0
    return sum(map(len, sequences)) - twice


def _one_stream(examples: Sequence[list[Tokens]], rows: Sequence[int], how: Cut) -> Batch:
    counted = zip(examples, rows, strict=True)
    sequences = [tokens for example in examples for tokens in example]
    return collate(sequences, [row for e, row in counted for _ in e], share=how.share)


class Loader:
    """Steps over a store, in an Order."""

    def __init__(self, store: Store, *, batch_size: int, seed: int, shuffle: bool, how: Cut):
        self.store, self.how = store, how
        self.order = Order(len(store), batch_size=batch_size, seed=seed, shuffle=shuffle)
        self.steps_per_epoch = self.order.steps_per_epoch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each example takes in a stream."""
        return self.store.lengths_when_shared if self.how.share else self.store.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max())

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of a step (0-based)."""
        return self.order.rows(step)

    def step(self, step: int) -> Step:
        rows = self.rows(step)
        return make_step([self.store.sequences(row) for row in rows], rows, self.how)

    def largest_stream(self, start: int, total: int) -> tuple[Batch | None, bool]:
        """The largest of this rank's streams in the steps from `start` to `total` (None: it has no rows), found from
        lengths alone; and whether a step has several streams. Of a long run, evenly spaced steps are looked at and the
        one in which the longest example comes first."""
        steps = list(range(start, total, max(1, (total - start) // LOOKED_AT)))
        first = self.order.step_of(int(self.lengths.argmax()), start // self.steps_per_epoch)
        if start <= first < total:
            steps.append(first)
        largest, size, several = list[int](), 0, False
        for step in steps:
            rows = self.rows(step)
            lengths = [int(self.lengths[row]) for row in rows]
            found = [[rows[i] for i in members] for members in streams(lengths, self.how)]
            several = several or len(found) > 1
            for members in found:
                tokens = int(self.lengths[members].sum())
                if tokens > size:
                    largest, size = members, tokens
        stream = _one_stream([self.store.sequences(row) for row in largest], largest, self.how) if largest else None
        return stream, several

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return self.order.epoch_at(step)


class StreamLoader:
    """Steps over a stream. Steps must be asked for in order; asking for a later one first (a resume) skips ahead."""

    steps_per_epoch = None
    longest = None  # not known beforehand

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
        return make_step(examples, list(range(first, first + len(examples))), self.how)

    def largest_stream(self, start: int, total: int) -> tuple[Batch | None, bool]:
        """Nobody knows before it is read."""
        return None, False

    def epoch_at(self, step: int) -> float:
        return 0.0


# Examples of an evaluation that are cut, and observed, together.
WINDOW = 1024


def evaluation_steps(store: Store, how: Cut) -> Iterator[Step]:
    """All examples, a window at a time so that little is held, each with this rank's share as streams."""
    for start in range(0, len(store), WINDOW):
        rows = list(range(start, min(start + WINDOW, len(store))))
        yield make_step([store.sequences(row) for row in rows], rows, how)
