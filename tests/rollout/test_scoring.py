"""Oracle: whatever a reward of a kind of the user's own does, the run goes on or ends with one message naming rows."""

from __future__ import annotations

import numpy as np
import pytest

from tunery.config import load_kind
from tunery.errors import RewardError
from tunery.rollout.scoring import Rewards
from tunery.types import Answer, Message, Sample, Tokens

KIND = """
import numpy as np
from tunery.rewards import RewardConfig

class Config(RewardConfig):
    kind: str = "acme_kinds.{name}"
    returns: str

class Reward:
    sandboxed = {sandboxed}

    def __init__(self, config):
        self.config = config

    def score(self, answers):
        return eval(self.config.returns, {{"n": len(answers), "np": np}})
"""


@pytest.fixture(params=["inside", "apart"])
def made(request, tmp_path, monkeypatch):
    """Makes rewards of a kind from outside, which returns what it is told; in the run's process, and in one apart."""
    (tmp_path / "acme_kinds").mkdir()
    code = KIND.format(name=request.param, sandboxed=request.param == "apart")
    (tmp_path / "acme_kinds" / f"{request.param}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    open_ones = []

    def make(returns: str) -> Rewards:
        open_ones.append(Rewards([load_kind("rewards", f"acme_kinds.{request.param}").Config(returns=returns)]))
        return open_ones[-1]

    yield make
    for rewards in open_ones:
        rewards.close()


def samples() -> list[Sample]:
    nothing = Tokens(np.zeros(2, np.int32), np.zeros(2, np.float32))
    asked = [Message("user", "Question?")]
    return [Sample(row, nothing, Answer(asked, "text", [1], "stop", None, {}, f"rows.jsonl:{row}")) for row in (1, 2)]


def test_numbers_of_any_kind_are_numbers(made):
    for returns in ("[1, np.float32(1)]", "[True, np.float64(1)]", "(1.0, 1.0)"):
        scored = samples()
        made(returns).score(scored)
        assert [type(sample.reward) for sample in scored] == [float, float]
        assert [sample.reward for sample in scored] == [1.0, 1.0]
    scored = samples()
    made("[None] * n").score(scored)
    assert [sample.reward for sample in scored] == [None, None]


@pytest.mark.parametrize("returns", ["[1.0]", "None", "['a'] * n", "['0.5'] * n", "1 / 0", "[[1.0]] * n", "[1.0] * 3"])
def test_everything_else_is_one_error(made, returns):
    with pytest.raises(RewardError, match=r"^rewards: (inside|apart) .*rows.jsonl:1|expected a list with one number"):
        made(returns).score(samples())
