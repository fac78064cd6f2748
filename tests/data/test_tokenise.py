"""Tokenising over processes. Oracle: the same rows tokenised in line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from toy_template import ToyTemplate
from tunery.data.store import pack_store
from tunery.data.tokenise import CHUNK, encode_examples, paused_gc, tokenise, worker_count
from tunery.errors import DataError
from tunery.objectives import pretrain, sft
from tunery.types import Example, Message, Refused, Tokens

SFT = sft.Objective(sft.Config())


def conversations(count: int) -> list[Example]:
    return [Example([Message("user", f"q{i}"), Message("assistant", "a" * (i % 7 + 1))]) for i in range(count)]


def run(examples, objective=SFT, template=None, workers=1, **options):
    origins = [(0, 0, i + 1) for i in range(len(examples))]
    return tokenise(examples, origins, objective, template or ToyTemplate(), workers, **options)


def test_processes_give_what_one_gives_in_the_same_order():
    examples = conversations(3 * CHUNK + 17)
    examples[5] = Example([Message("user", "no answer")])
    examples[2 * CHUNK + 3] = Example([Message("user", "x" * 99), Message("assistant", "y")])
    parts: list[int] = []
    alone, marks = run(examples, template=ToyTemplate(50))
    both, marks_too = run(examples, template=ToyTemplate(50), workers=2, progress=parts.append)
    assert worker_count(len(examples), 2) == 2 or os.name != "posix"
    left, right = pack_store(alone, ["f"]), pack_store(both, ["f"])
    assert np.array_equal(left.ids, right.ids) and np.array_equal(left.weights, right.weights)
    assert np.array_equal(left.rows, right.rows)
    assert (
        marks.refused
        == marks_too.refused
        == [
            (5, Refused("no assistant turn")),
            (2 * CHUNK + 3, Refused("too long", "102 tokens > 50")),
        ]
    )
    assert parts == [CHUNK, CHUNK, CHUNK, 17]
    assert left.rows.tolist() == [i + 1 for i in range(len(examples)) if i not in (5, 2 * CHUNK + 3)]


def test_little_is_done_in_line():
    assert worker_count(2000, None) == 1
    assert worker_count(1_000_000, 1) == 1
    assert worker_count(2001, 8) in (1, 3)  # no more processes than chunks; one where forking is not safe


def test_each_piece_of_a_text_is_an_example_of_its_own():
    template = ToyTemplate(4)
    kept, marks = encode_examples(
        [Example(text="abcdefgh"), Example(text="xy")], pretrain.Objective(pretrain.Config()), template
    )
    assert [(number, len(row)) for number, row in kept] == [(0, 1), (0, 1), (0, 1), (1, 1)] and not marks.refused


def test_sequences_of_a_conversation_stay_together_and_none_is_refused():
    class Pieces:
        def rows(self, examples, template):
            one = Tokens(np.zeros(2, np.int32), np.ones(2, np.float32))
            return [[one, one], []]

    kept, marks = encode_examples(conversations(2), Pieces(), ToyTemplate())
    assert [(number, len(row)) for number, row in kept] == [(0, 2)]
    assert marks.refused == [(1, Refused("nothing to train"))]


class Killed:
    def rows(self, examples, template):
        os.kill(os.getpid(), signal.SIGKILL)


class Wrong:
    def rows(self, examples, template):
        raise ZeroDivisionError("in a process")


@pytest.mark.skipif(worker_count(10_000, 2) == 1, reason="processes are not forked on this platform")
def test_a_killed_process_is_an_error_and_an_exception_comes_through():
    with pytest.raises(DataError, match="a tokenising process was killed"):
        run(conversations(3000), Killed(), workers=2)
    with pytest.raises(ZeroDivisionError, match="in a process"):
        run(conversations(3000), Wrong(), workers=2)


def test_the_collector_comes_back_even_after_an_error():
    import gc

    with pytest.raises(ValueError, match="x"), paused_gc():
        assert not gc.isenabled()
        raise ValueError("x")
    assert gc.isenabled()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_workers_do_not_outlive_a_parent_that_is_killed():
    code = (
        "import time, tunery.data.tokenise as t\n"
        "from tunery.types import Example\n"
        "class Slow:\n"
        "    def rows(self, examples, template):\n"
        "        time.sleep(60)\n"
        "work = t._in_processes([Example(text='a')] * 5000, [('f', 1)] * 5000, Slow(), None, 2)\n"
        "next(work)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    children: list[str] = []
    deadline = time.time() + 30
    while len(children) < 2 and time.time() < deadline:
        found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=False)
        children = found.stdout.split()
        time.sleep(0.1)
    assert len(children) == 2
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    for child in children:
        status = Path(f"/proc/{child}/stat")
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
