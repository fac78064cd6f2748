"""Oracle: a run goes on, or ends with one message, whatever a reward does in its process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tunery.errors import ConfigError, RewardError
from tunery.rewards.function import Config
from tunery.rollout.sandbox import SandboxedReward
from tunery.types import Answer, Message

CODE = """
import os, sys, time

def good(completions, prompts, ground_truth=None, **columns):
    print("prints are harmless")
    return [len(text) / 10 for text in completions]

def picky(completions):
    for text in completions:
        if text == "raise":
            raise ValueError("I do not like this")
        if text == "hang":
            time.sleep(1000)
        if text == "exit":
            os._exit(3)
        if text == "quit":
            sys.exit("bye")
        if text == "memory":
            bytearray(3 * 10**9)
        if text == "close":
            os.closerange(3, 64)
            time.sleep(1000)
        if text == "loop":
            while True:
                pass
    return [1.0 for text in completions]

def few(completions):
    return [1.0]

def words(completions):
    return ["good"] * len(completions)

def nothing(completions):
    return [None for _ in completions]

def wants(completions, level):
    return level

def together(completions):
    if len(completions) > 1:
        raise RuntimeError("one at a time, please")
    return [0.5]

def child(completions):
    import subprocess
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
"""


def answer(text: str, row: int = 1, **columns) -> Answer:
    return Answer([Message("user", "Question?")], text, [1, 2], "stop", None, columns, f"rows.jsonl:{row}")


@pytest.fixture
def made(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    open_ones = []

    def make(name: str, **options) -> SandboxedReward:
        reward = SandboxedReward(Config(path=f"{tmp_path / 'mine.py'}:{name}", **options), name)
        open_ones.append(reward)
        return reward

    yield make
    for reward in open_ones:
        reward.close()


def test_scores_come_back_and_prints_do_no_harm(made, capfd):
    reward = made("good")
    assert reward.score([answer("ten chars!"), answer("five!")]) == [1.0, 0.5]
    assert reward.score([answer("x" * 300_000)]) == [30_000.0]  # more than a pipe holds
    assert capfd.readouterr().err.count("prints are harmless") == 2


FAILURES = {
    "raise": "ValueError: I do not like this .*mine.py:11",
    "hang": "longer than 1 s",
    "exit": "exit status 3",
    "quit": "SystemExit: bye",
    "memory": "MemoryError",
    "loop": "longer than 1 s",
    "close": "closed the pipe that answers come through",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_failure_names_the_row_and_can_be_given_a_score(made, text):
    answers = [answer("fine", 1), answer(text, 2), answer("fine", 3)]
    began = time.monotonic()
    with pytest.raises(RewardError, match=rf"rewards: picky failed on an answer to rows.jsonl:2: .*{FAILURES[text]}"):
        made("picky", timeout=1.0, memory=2.0).score(answers)
    forgiving = made("picky", timeout=1.0, memory=2.0, on_error=-1.0)
    assert forgiving.score(answers) == [1.0, -1.0, 1.0]
    assert forgiving.score([answer("fine")]) == [1.0]  # its process is there again
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "it returned 1 values, expected a list with one number for each of 2"),
        ("words", "it returned 'good', which is no number"),
        ("wants", "it needs 'level', and the rows have completion_ids, completions, .*"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(made, name, message):
    if name == "few":  # one by one, one is right
        with pytest.raises(RewardError, match=f"failed on 2 answers together.*{message}"):
            made(name).score([answer("a"), answer("b")])
    else:
        with pytest.raises(RewardError, match=message):
            made(name).score([answer("a"), answer("b")])


def test_columns_and_nothing_at_all(made):
    assert made("wants").score([answer("a", level=2), answer("b", level=3.5)]) == [2.0, 3.5]
    assert made("nothing").score([answer("a")]) == [None]
    with pytest.raises(RewardError, match=r"2 answers together, of rows.jsonl:1 to rows.jsonl:2, and on none"):
        made("together").score([answer("a", 1), answer("b", 2)])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(): pass", "has no function 'f' .there: g."),
        ("import os; os._exit(4)", "exit status 4"),
        ("raise RuntimeError('broken file')", "RuntimeError: broken file"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_wrong_configuration(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(ConfigError, match=f"rewards: f cannot be used: .*{message}"):
        SandboxedReward(Config(path=f"{tmp_path / 'bad.py'}:f"), "f").start()


def test_what_it_started_ends_with_it(made, tmp_path):
    reward = made("child", timeout=1.0, on_error=0.0)
    reward.start()
    assert reward._process is not None
    session = reward._process.pid
    assert reward.score([answer("a")]) == [0.0]
    time.sleep(0.2)

    def in_session(pid: str) -> bool:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return False
        return int(fields[3]) == session and fields[0] != "Z"

    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and in_session(pid)]
