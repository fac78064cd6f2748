"""Oracle: every row once an epoch, whatever the cut; the same step however often it is asked for."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from tunery.data.loader import Cut, Loader, StreamLoader, cut, evaluation_steps
from tunery.data.order import Order, epoch_order
from tunery.types import Tokens


class Rows:
    """A store of examples; example i is made of the token i, once in a while in two sequences."""

    def __init__(self, count: int):
        random = np.random.default_rng(7)
        self.examples = [
            [Tokens(np.full(n, i, np.int32), np.ones(n, np.float32)) for n in random.integers(2, 30, 1 + (i % 5 == 0))]
            for i in range(count)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([sum(len(t) for t in e) for e in self.examples])

    def sequences(self, number: int) -> list[Tokens]:
        return self.examples[number]

    def examples_from(self, epoch: int):
        return [(self.examples[i], ("f", i)) for i in epoch_order(len(self), 1, epoch, True)]


def rows_of(batches) -> list[int]:
    return [row for batch in batches for row in batch.rows]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_step_holds_the_examples_of_its_order(shuffle):
    rows = Rows(37)
    loader = Loader(rows, batch_size=8, seed=1, shuffle=shuffle, how=Cut(64))
    order = Order(37, batch_size=8, seed=1, shuffle=shuffle)
    assert loader.steps_per_epoch == order.steps_per_epoch == 5
    for number in range(12):
        step = loader.step(number)
        assert step.rows == loader.rows(number) == order.rows(number)
        assert list(step.examples) == [rows.examples[row] for row in step.rows]
        assert set(rows_of(step.micro)) == set(step.rows) and loader.epoch_at(number) == order.epoch_at(number)


def test_a_step_does_not_depend_on_what_was_asked_before():
    fresh = Loader(Rows(37), batch_size=8, seed=1, shuffle=True, how=Cut(64))
    used = Loader(Rows(37), batch_size=8, seed=1, shuffle=True, how=Cut(64))
    for step in range(8):
        used.step(step)
    for a, b in zip(fresh.step(3).micro, used.step(3).micro, strict=True):
        assert a.ids_T.equal(b.ids_T) and a.rows == b.rows


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_the_cut_keeps_every_sequence_whole(packing, world):
    store = Rows(16)
    expected = Counter(i for i, e in enumerate(store.examples) for _ in e)
    batches = [b for r in range(world) for b in cut(store.examples, range(16), Cut(64, packing, r, world))]
    assert Counter(rows_of(batches)) == expected
    assert all(len(set(b.rows)) == 1 for b in batches) or packing
    for batch in batches:
        assert batch.rows == sorted(batch.rows)
        assert packing is False or batch.n_tokens <= 64 or len(set(batch.rows)) == 1
        for row, start, end in zip(batch.rows, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
            assert batch.ids_T[start:end].tolist() == [row] * int(end - start)


def test_evaluation_visits_every_row_once():
    assert set(rows_of(batch for step in evaluation_steps(Rows(1100), Cut(256)) for batch in step.micro)) == set(
        range(1100)
    )


class Streamed:
    def __init__(self, rows: Rows):
        self.rows = rows

    def forever(self, start: int):
        epochs = (example for epoch in itertools.count() for example in self.rows.examples_from(epoch))
        return itertools.islice(epochs, start, None)


def test_a_stream_resumes_where_it_would_have_been():
    rows = Rows(11)
    through = StreamLoader(Streamed(rows), batch_size=4, how=Cut(64))
    steps = [through.step(n) for n in range(7)]
    resumed = StreamLoader(Streamed(rows), batch_size=4, how=Cut(64)).step(5)
    assert [b.ids_T.tolist() for b in resumed.micro] == [b.ids_T.tolist() for b in steps[5].micro]
    assert len(resumed.rows) == 4 and resumed.tokens == steps[5].tokens


@pytest.mark.parametrize("how", [Cut(64), Cut(200, world=3, rank=1), Cut(64, packing=False)])
def test_a_step_cut_again_is_the_step_of_that_cut(how):
    loaders = [Loader(Rows(37), batch_size=8, seed=1, shuffle=True, how=h) for h in (Cut(90), how)]
    first, other = (loader.step(3) for loader in loaders)
    again = first.recut(how)
    assert [(b.ids_T.tolist(), b.rows) for b in again.micro] == [(b.ids_T.tolist(), b.rows) for b in other.micro]
    assert again.tokens == first.tokens == other.tokens and again.recut(how) is again


@pytest.mark.parametrize("how", [Cut(64), Cut(200, world=3, rank=1), Cut(64, packing=False), Cut(10_000)])
@pytest.mark.parametrize("start", [0, 3])
def test_the_largest_stream_of_a_run_is_found_from_lengths(how, start):
    loader = Loader(Rows(37), batch_size=8, seed=1, shuffle=True, how=how)
    steps = [loader.step(n) for n in range(start, 12)]
    stream, several = loader.largest_stream(start, 12)
    assert stream is not None and stream.n_tokens == max(step.largest for step in steps)
    assert any(b.ids_T.equal(stream.ids_T) and b.rows == stream.rows for step in steps for b in step.micro)
    assert several == any(len(step.micro) > 1 for step in steps)


def test_of_a_long_run_the_longest_example_is_looked_at(monkeypatch):
    monkeypatch.setattr("tunery.data.loader.LOOKED_AT", 3)
    rows = Rows(100)
    rows.examples[61] = [Tokens(np.full(500, 61, np.int32), np.ones(500, np.float32))]
    loader = Loader(rows, batch_size=4, seed=2, shuffle=True, how=Cut(64))
    stream, _ = loader.largest_stream(0, 75)
    assert stream is not None and stream.n_tokens == 500


def test_a_rank_without_rows_has_no_largest_stream():
    loader = Loader(Rows(2), batch_size=2, seed=1, shuffle=True, how=Cut(64, world=3, rank=2))
    assert loader.largest_stream(0, 4) == (None, False)
