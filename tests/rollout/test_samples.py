"""Oracles: rows whose truth a person can see, cuts and figures worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tunery.data.loader import Cut
from tunery.objectives._generated import places, prompt_rows, question
from tunery.rollout.figures import figures_of, is_equal
from tunery.rollout.samples import load_groups, make_sample, runs, save_groups, truth_of
from tunery.types import Completion, Example, Message, Refused, Sample

USER, ANSWER = Message("user", "2 + 2?"), Message("assistant", "4")


def made(count: int, prompt: int = 5, reward: float | None = None, finish: str = "stop", row: int = 0) -> Sample:
    completion = Completion(0, list(range(10, 10 + count)), "text", finish, None, [-0.5] * count)
    sample = make_sample(row, Example([USER, ANSWER]), np.arange(prompt, dtype=np.int32), completion, 16)
    sample.reward = reward
    sample.rewards = {"r": reward}
    return sample


def test_what_is_right_is_a_column_or_the_last_answer():
    assert truth_of(Example([USER, ANSWER])) == "4" and truth_of(Example([USER])) is None
    columns = {"answer": 5, "solution": None, "prompt": "x"}
    assert truth_of(Example([USER, ANSWER], meta={"columns": columns})) == 5
    assert truth_of(Example([USER], meta={"columns": {**columns, "ground_truth": 0}})) == 0


def test_the_question_ends_with_the_last_turn_that_asks():
    tool = Message("tool", "4")
    assert question(Example([USER, ANSWER])) == [USER] and question(Example([USER, ANSWER, USER])) == [
        USER,
        ANSWER,
        USER,
    ]
    assert question(Example([USER, ANSWER, tool, ANSWER])) == [USER, ANSWER, tool]
    rows = prompt_rows([Example([ANSWER]), Example(text="x"), Example([USER], media=[{}])], None)
    assert [row.reason for row in rows if isinstance(row, Refused)] == [
        "no user turn", "wrong objective", "media not supported",
    ]  # fmt: skip


def test_a_completion_stays_the_tokens_it_was():
    sample = made(3)
    assert sample.tokens.ids.tolist() == [0, 1, 2, 3, 4, 10, 11, 12]
    assert sample.tokens.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert places(sample.tokens).tolist() == [4, 5, 6]  # each is predicted from the place before it
    assert sample.tokens.extra["generated_logps"].tolist() == [0, 0, 0, 0, -0.5, -0.5, -0.5, 0]
    assert sample.tokens.extra["limit"] == 16.0 and sample.answer.prompt == [USER] and sample.answer.ground_truth == "4"


def test_a_group_is_cut_where_a_stream_is_full():
    group = [made(n) for n in (3, 4, 5, 20, 1)]  # 8, 9, 10, 25, 6 tokens; shared: the answer and one token each

    def lengths(how: Cut) -> list[list[int]]:
        return [[len(sample.answer.ids) for sample in run] for run in runs(group, how)]

    assert lengths(Cut(20)) == [[3, 4], [5], [20], [1]]
    assert lengths(Cut(20, share=True)) == [[3, 4, 5], [20], [1]]  # 8 + 5 + 6 = 19
    assert lengths(Cut(1000)) == [[3, 4, 5, 20, 1]]
    assert lengths(Cut(1000, packing=False, share=True)) == [[3], [4], [5], [20], [1]]


def test_groups_in_a_checkpoint_are_what_they_were(tmp_path):
    groups = [[made(3, row=1), made(2, row=1)], [made(1, row=2)]]
    save_groups(tmp_path / "rollout.pt", 7, groups)
    number, loaded = load_groups(tmp_path / "rollout.pt")
    assert number == 7 and [len(group) for group in loaded] == [2, 1]
    for before, after in zip(itertools.chain(*groups), itertools.chain(*loaded), strict=True):
        assert after.row == before.row and list(after.answer.ids) == list(before.answer.ids)
        assert after.tokens.ids.dtype == np.int32 and np.array_equal(after.tokens.ids, before.tokens.ids)
        assert np.array_equal(after.tokens.weights, before.tokens.weights)
        assert after.tokens.extra.keys() == before.tokens.extra.keys()
        assert np.array_equal(after.tokens.extra["generated_logps"], before.tokens.extra["generated_logps"])


def test_figures_by_hand():
    groups = [
        [made(2, reward=1.0), made(4, reward=0.0, finish="length")],
        [made(3, reward=0.5), made(3, reward=0.5)],
        [made(1, reward=None), made(1, reward=2.0)],
    ]
    figures = {name: value / weight for name, (value, weight) in figures_of(groups).items()}
    assert figures["reward"] == pytest.approx(4.0 / 5) and figures["rewards/r/mean"] == pytest.approx(4.0 / 5)
    assert figures["rewards/r/std"] == pytest.approx(np.std([1, 0, 0.5, 0.5, 2], ddof=1))
    assert figures["reward_std"] == pytest.approx((0.5**0.5 + 0) / 2)  # of the two groups that have one
    assert figures["frac_reward_zero_std"] == pytest.approx(2 / 3)  # one answer cannot differ from itself
    assert figures["completions/mean_length"] == pytest.approx(14 / 6)
    assert figures["completions/clipped_ratio"] == pytest.approx(1 / 6)
    assert [is_equal(group) for group in groups] == [False, True, True]
