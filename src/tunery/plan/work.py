"""What a run's steps will be made of, from the lengths of its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunery.data.loader import Cut, streams
from tunery.data.order import Order
from tunery.data.store import TokenStore
from tunery.job import Job
from tunery.plan.shadow import Stream

# Steps of the first epoch that are looked at, evenly spaced, where there are more.
SAMPLED = 512


class AssumedRows:
    """Rows that nobody has read yet: each one sequence of the longest kind, trained on all over."""

    def __init__(self, count: int, length: int):
        self.lengths = self.lengths_when_shared = np.full(count, length, dtype=np.int64)
        self.labelled = self.lengths - 1

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence_lengths(self, number: int) -> np.ndarray:
        return self.lengths[number : number + 1]


Rows = TokenStore | AssumedRows


@dataclass
class Work:
    """The steps of a run with one cut, as if its model could share prompts. `steps` and `steps_per_epoch` None where
    the rows are not known; `tokens` of a mean step over all ranks; `streams` the token counts of this rank's streams in
    each step looked at; `largest` the longest stream of them; `labelled` the share of tokens trained on; `mean_length`
    of a sequence, averaged over tokens; `per_example` how many sequences each has, 1 where not all have as many."""

    steps: int | None
    steps_per_epoch: int | None
    tokens: float
    streams: list[list[int]]
    largest: Stream
    labelled: float
    mean_length: float
    per_example: int = 1

    @property
    def accumulates(self) -> bool:
        """Whether a step may take several micro-batches."""
        return any(len(step) > 1 for step in self.streams)

    def typical(self, tokens: int) -> Stream:
        """A stream of so many tokens, of whole examples with sequences of the mean length."""
        length = max(1, min(tokens, round(self.mean_length)))
        if self.per_example > 1:
            count = self.per_example * max(1, round(tokens / (length * self.per_example)))
            lengths = [tokens // count + (i < tokens % count) for i in range(count)]
        else:
            count, rest = divmod(tokens, length)
            lengths = [length] * count + ([rest] if rest else [])
        return Stream(tuple(lengths), max(1, round(self.labelled * tokens)))


def work_of(job: Job, rows: Rows, micro_tokens: int, world: int = 1) -> Work:
    """What `job` makes of `rows` when streams hold `micro_tokens` tokens."""
    train = job.train
    how = Cut(micro_tokens, train.packing, 0, world, train.share_prompts and train.neftune is None)
    taken = rows.lengths_when_shared if how.share else rows.lengths
    order = Order(len(rows), batch_size=train.batch_size, seed=train.seed, shuffle=train.shuffle)
    known = not isinstance(rows, AssumedRows)
    total = train.max_steps or (math.ceil(train.epochs * order.steps_per_epoch) if known else None)
    count = min(total or 1, order.steps_per_epoch)
    looked_at = range(0, count, max(1, count // SAMPLED))
    cuts: list[list[int]] = []
    largest, tokens = ((), 0), 0
    for step in looked_at:
        numbers = order.rows(step)
        lengths = [int(taken[i]) for i in numbers]
        tokens += int(rows.lengths[numbers].sum())
        members = [[numbers[j] for j in stream] for stream in streams(lengths, how)]
        cuts.append([sum(int(taken[i]) for i in stream) for stream in members])
        for stream, size in zip(members, cuts[-1], strict=True):
            largest = max(largest, (tuple(stream), size), key=lambda found: found[1])
    return Work(
        total, order.steps_per_epoch if known else None, tokens / len(looked_at), cuts, _stream(rows, largest[0], how),
        float(rows.labelled.sum() / taken.sum()), _mean_length(rows), _per_example(rows),
    )  # fmt: skip


def _stream(rows: Rows, numbers: Sequence[int], how: Cut) -> Stream:
    lengths: list[int] = []
    continues: list[int] = []
    for i in numbers:
        shared, pieces = _pieces(rows, i, how)
        continues += [-1, *[len(lengths)] * len(pieces)] if shared else [-1] * len(pieces)
        lengths += [shared, *pieces] if shared else pieces
    chain = tuple(continues) if any(before >= 0 for before in continues) else ()
    return Stream(tuple(lengths), max(1, int(sum(rows.labelled[i] for i in numbers))), chain)


def _pieces(rows: Rows, number: int, how: Cut) -> tuple[int, list[int]]:
    """The lengths of an example's pieces (data/collate.py): of what its sequences share (0: nothing), of each's own."""
    lengths = rows.sequence_lengths(number)
    saved = int(rows.lengths[number] - rows.lengths_when_shared[number]) if how.share else 0
    shared = saved // max(1, len(lengths) - 1)
    return shared, [int(length) - shared for length in lengths]


def _per_example(rows: Rows) -> int:
    if isinstance(rows, AssumedRows):
        return 1
    counts = np.unique(np.diff(rows.example_offsets))
    return int(counts[0]) if len(counts) == 1 else 1


def _mean_length(rows: Rows, sampled: int = 2000) -> float:
    """Sum of squares over sum: attention costs a token what stands before it."""
    numbers = range(0, len(rows), max(1, len(rows) // sampled))
    lengths = np.concatenate([rows.sequence_lengths(i) for i in numbers]).astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())
