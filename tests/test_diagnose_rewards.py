"""Oracle: curves that have the trouble, and ordinary ones that do not."""

from __future__ import annotations

import random

import pytest

from tunery.diagnose import DataCounts
from tunery.diagnose_rewards import diagnose_rewards, learns_from_rewards
from tunery.history import History, Step


def history(count: int = 60, **curves) -> History:
    """A run that learns: the reward rises, the rest wanders; `curves` (name, _ for /) are functions of progress."""
    noise = random.Random(1)
    ordinary = {
        "reward": lambda x: 0.2 + 0.7 * x,
        "completions/mean_length": lambda x: 40 + 10 * x,
        "completions/clipped_ratio": lambda x: 0.1,
        "entropy": lambda x: 0.8 - 0.4 * x,
        "kl": lambda x: 0.05 * x,
        "frac_reward_zero_std": lambda x: 0.1 + 0.5 * x,
        "rollout/difference": lambda x: 0.01,
    }
    steps = []
    for i in range(count):
        values = {name: curves.get(name.replace("/", "_"), curve)(i / (count - 1)) for name, curve in ordinary.items()}
        metrics = {name: (8 * v * noise.uniform(0.9, 1.1), 8.0) for name, v in values.items()}
        steps.append(Step(i + 1, 0.01, 100, 1e-4, 1.0, 1000, 8, 0.1, 1.0, float(i), metrics))
    return History(steps)


COUNTS = DataCounts(read=100, used=100, tokens=1000, labelled=0, eval_rows=10, prompts=True)


def kinds(found: History) -> list[str]:
    return [diagnosis.kind for diagnosis in diagnose_rewards(found, COUNTS)]


def test_an_ordinary_run_is_left_alone():
    assert kinds(history()) == [] and kinds(history(5)) == [] and kinds(History()) == []
    assert learns_from_rewards(history()) and not learns_from_rewards(History())


TROUBLES = {
    "length drift": [
        {"completions_mean_length": lambda x: 40 + 80 * x},
        {"completions_mean_length": lambda x: 40 - 30 * x},
        {"completions_clipped_ratio": lambda x: 0.1 + 0.8 * x},
    ],
    "entropy collapse": [{"entropy": lambda x: 0.8 * (1 - x) ** 2 + 0.01}],
    "kl blow-up": [{"kl": lambda x: 0.02 if x < 0.7 else 3.0}],
    "all groups equal": [{"frac_reward_zero_std": lambda x: 1.0, "reward": lambda x: 0.0}],
    "generator differs": [{"rollout_difference": lambda x: 0.2}],
    "reward does not rise": [{"reward": lambda x: 0.3, "frac_reward_zero_std": lambda x: 0.2}],
}


@pytest.mark.parametrize("kind", TROUBLES)
def test_each_trouble_is_found_and_said_in_words(kind):
    for curves in TROUBLES[kind]:
        found = diagnose_rewards(history(**curves), COUNTS)
        assert [diagnosis.kind for diagnosis in found] == [kind]
        assert found[0].evidence and found[0].message.endswith(".")


def test_equal_groups_at_the_end_of_success_are_a_note():
    (found,) = diagnose_rewards(
        history(frac_reward_zero_std=lambda x: 0.1 + 0.95 * x, reward=lambda x: 0.2 + 0.8 * x), COUNTS
    )
    assert found.kind == "all groups equal" and found.level == "note" and "the run is done" in found.message


def test_nothing_held_out_is_said():
    (found,) = diagnose_rewards(history(), DataCounts(read=100, used=100, prompts=True))
    assert found.kind == "no evaluation"


def test_a_run_in_which_nothing_counts_says_so():
    """Every answer cut off and left out; no reward that applies; and a distillation, which needs no reward."""
    left_out, unscored, unrewarded = history(4), history(4), history(4)
    for step in left_out.steps:
        step.metrics["entropy"] = (0.0, 0.0)
    for step in unscored.steps:
        step.metrics |= {"reward": (0.0, 0.0), "rewards/mine/mean": (0.0, 0.0)}
    for step in unrewarded.steps:
        step.metrics["reward"] = (0.0, 0.0)
    assert [kinds(found) for found in (left_out, unscored, unrewarded)] == [["nothing trained"]] * 2 + [[]]
    left_out.steps[0].metrics["entropy"] = left_out.steps[1].metrics["entropy"] = (1.0, 8.0)
    assert kinds(left_out) == []
    for step in left_out.steps[1:]:
        step.weight = 0.0
    assert kinds(left_out) == ["nothing trained"]
