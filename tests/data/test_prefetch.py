"""Oracle: the loader itself, asked for the same steps."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from test_loader import Rows, Streamed

from tunery.data.loader import Cut, Loader, StreamLoader
from tunery.data.prefetch import Prefetcher
from tunery.errors import DataError

CPU = torch.device("cpu")


def loaders():
    rows = Rows(37)
    yield lambda: Loader(rows, batch_size=8, seed=1, shuffle=True, how=Cut(64))
    yield lambda: StreamLoader(Streamed(rows), batch_size=8, how=Cut(64))


def streams(work) -> list[tuple[list[int], list[int]]]:
    return [(batch.ids_T.tolist(), batch.rows) for batch in work.micro]


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("tunery-data")]


@pytest.mark.parametrize("number", [0, 1], ids=["store", "stream"])
@pytest.mark.parametrize("start", [0, 4])
def test_the_steps_are_the_loaders(number, start):
    make = list(loaders())[number]
    alone = make()
    with Prefetcher(make(), 9, CPU) as ahead:
        for step in range(start, 9):
            mine, theirs = ahead.step(step), alone.step(step)
            assert streams(mine) == streams(theirs)
            assert (mine.rows, mine.tokens) == (theirs.rows, theirs.tokens)
    assert not threads()


def test_any_step_can_be_asked_for():
    make = next(loaders())
    with Prefetcher(make(), 9, CPU) as ahead:
        assert [streams(ahead.step(n)) for n in (3, 3, 7, 0)] == [streams(make().step(n)) for n in (3, 3, 7, 0)]


class Recording:
    """Says when each step is made, and fails at one."""

    def __init__(self, fails_at: int = -1):
        self.loader, self.fails_at, self.begun = next(loaders())(), fails_at, []

    def step(self, step: int):
        self.begun.append(step)
        if step == self.fails_at:
            raise DataError("rows.jsonl: row 3 is bad")
        return self.loader.step(step)


def test_one_step_is_made_ahead_none_beyond_the_end_and_none_is_kept():
    recording = Recording()
    with Prefetcher(recording, 3, CPU) as ahead:
        first = weakref.ref(ahead.step(0))
        deadline = time.time() + 5
        while recording.begun != [0, 1] and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert recording.begun == [0, 1]
        ahead.step(1)
        gc.collect()
        assert first() is None
        ahead.step(2)
    assert recording.begun == [0, 1, 2]


def test_an_error_is_raised_at_its_step_and_no_thread_is_left():
    with pytest.raises(DataError, match="row 3"), Prefetcher(Recording(fails_at=2), 9, CPU) as ahead:
        for step in range(9):
            ahead.step(step)
            assert step < 2
    assert not threads()


def test_leaving_early_waits_for_the_step_in_the_making():
    recording = Recording()
    with pytest.raises(KeyboardInterrupt), Prefetcher(recording, 9, CPU) as ahead:
        ahead.step(0)
        raise KeyboardInterrupt
    assert not threads() and recording.begun in ([0], [0, 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_devices_data_are_pinned():
    make = next(loaders())
    with Prefetcher(make(), 3, torch.device("cuda", 0)) as ahead:
        batch = ahead.step(0).micro[0]
        assert batch.ids_T.is_pinned() and batch.labelled_N.is_pinned()
        assert batch.to("cuda:0").ids_T.tolist() == make().step(0).micro[0].ids_T.tolist()
