"""Oracles: a step is the same however it is cut, shared, resumed or spread over ranks (float64); what a rollout is made
of is a function of (weights, seed, number)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import runs_on_two_ranks
from tiny_runs import losses, tiny_job
from tunery.errors import ConfigError, DataError, RewardError
from tunery.job import load_job
from tunery.loop import run_job

ROLLOUT = {"group": 3, "max_new_tokens": 10}
REWARDS = [
    {"kind": "length", "unit": "characters", "target": 25},
    {"kind": "language", "script": "latin", "weight": 0.5},
]


def write_prompts(path: Path, count: int = 10, start: int = 0) -> Path:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    rows = [
        {"messages": [{"role": "user", "content": f"{i}: " + " ".join(words[(i + k) % 6] for k in range(2 + i % 4))}]}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def job(folder: Path, output: str = "run", **changes):
    prompts = write_prompts(folder / "prompts.jsonl")
    values = {
        "data": {"train": str(prompts), "eval": None}, "objective": {"kind": "grpo"}, "rewards": REWARDS,
        "rollout": {**ROLLOUT, **changes.pop("rollout", {})}, "adapter": {"kind": "lora", "rank": 4},
        "train": {"batch_size": 4, "max_steps": 4, "max_grad_norm": None, **changes.pop("train", {})},
        "output": str(folder / output), **changes,
    }  # fmt: skip
    return tiny_job(folder, **values)


def weights(output: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / "adapter_model.safetensors")


def lines(output: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "rollouts.jsonl").read_text().splitlines()]


def logged(output: str | Path, key: str) -> list[float]:
    found = [json.loads(line) for line in (Path(output) / "trainer_log.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


CUTS = {
    "small streams": {"train": {"micro_tokens": 60}},
    "one by one": {"train": {"packing": False}},
    "prompts for each": {"train": {"share_prompts": False}},
    "recomputed": {"train": {"checkpointing": "full"}},
}
OBJECTIVES = {
    "dapo": {"kind": "grpo", "correction": 2.0},
    "gspo": {"kind": "grpo", "loss": "grpo", "ratio": "sequence", "beta": 0.1},
    "reinforce++": {"kind": "grpo", "advantage": "reinforce++", "beta": 0.1, "loss": "dr_grpo"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_does_not_depend_on_the_cut(tmp_path, name):
    more = {"objective": OBJECTIVES[name], "rollout": {"minibatches": 2, "iterations": 2}}
    run_job(job(tmp_path, "whole", **more))
    whole = tmp_path / "whole"
    assert len(losses(whole)) == 4 and len({tuple(line["prompt"][0].items()) for line in lines(whole)}) > 1
    assert max(abs(loss) for loss in losses(whole)) > 1e-3
    for number, cut in enumerate(CUTS.values()):
        run_job(job(tmp_path, f"cut{number}", **more, **cut))
        other = tmp_path / f"cut{number}"
        assert [line["completion"] for line in lines(other)] == [line["completion"] for line in lines(whole)]
        assert losses(other) == pytest.approx(losses(whole), rel=1e-9, abs=1e-12)
        for key, value in weights(other).items():
            torch.testing.assert_close(value, weights(whole)[key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("at", [2, 3], ids=["between rollouts", "within one"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, at):
    changes = {
        "model": {"dtype": "float32"}, "rollout": {"minibatches": 2}, "objective": OBJECTIVES["gspo"],
        "train": {"max_steps": 6, "save_every": 1, "keep": None},
    }  # fmt: skip
    run_job(job(tmp_path, "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(at + 1, 7):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    (tmp_path / "cut" / "all_results.json").unlink()
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    assert (tmp_path / f"cut/checkpoint-{at}/rollout.pt").is_file() == (at % 2 == 1)
    run_job(job(tmp_path, "cut", **changes))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert all(weights(tmp_path / "cut")[k].equal(v) for k, v in weights(tmp_path / "whole").items())


def test_changed_ground_truths_are_noticed(tmp_path):
    """The prompts are the same tokens as before, and a resumed run would be judged by other answers."""
    data = {"train": str(tmp_path / "prompts.jsonl"), "eval": str(write_prompts(tmp_path / "held.jsonl", 3, 20))}
    made = job(tmp_path, data=data, train={"max_steps": 1})
    run_job(made)
    assert run_job(made).already_finished
    for name, part in (("prompts", "train"), ("held", "eval")):
        path = tmp_path / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(before.replace('{"messages"', '{"answer": "4", "messages"', 1))
        with pytest.raises(DataError, match=f"the {part} data have changed"):
            run_job(made)
        path.write_text(before)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    made = job(
        tmp_path, "one", objective=OBJECTIVES["gspo"], rollout={"minibatches": 2, "resample": 1},
        data={"train": str(tmp_path / "prompts.jsonl"), "eval": str(write_prompts(tmp_path / "held.jsonl", 3, 20))},
        eval={"every": 2, "best": False},
    )  # fmt: skip
    run_job(made)
    status, text = runs_on_two_ranks(tmp_path, made.model_copy(update={"output": str(tmp_path / "two")}))
    assert status == 0, text
    assert [line["completion"] for line in lines(tmp_path / "two")] == [
        line["completion"] for line in lines(tmp_path / "one")
    ]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9, abs=1e-12)
    for key in ("reward", "reward_std", "rewards/length/mean", "completions/mean_length", "eval_loss"):
        assert logged(tmp_path / "two", key) == pytest.approx(logged(tmp_path / "one", key), rel=1e-12), key
    for key, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[key], rtol=1e-7, atol=1e-9)


def test_engine_and_generator_agree_and_prompts_are_as_inference_sends_them(tmp_path):
    """At another temperature than 1, too: both say the probability that was sampled from."""
    run_job(job(tmp_path, rollout={"temperature": 1.7, "top_k": 40, "iterations": 2}))
    assert logged(tmp_path / "run", "rollout/difference") == pytest.approx([0.0] * 4, abs=1e-9)
    assert max(logged(tmp_path / "run", "entropy")) > 1
    first = lines(tmp_path / "run")[0]
    assert first["prompt"][0]["role"] == "user" and set(first["rewards"]) == {"length", "language"}
    assert first["reward"] == pytest.approx(first["rewards"]["length"] + 0.5 * first["rewards"]["language"])


def test_a_function_of_the_users_gets_the_rows_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def seen(completions, prompts, ground_truth, level, finishes):\n"
        "    assert all(truth == 'yes' for truth in ground_truth) and set(level) <= {1, 2}\n"
        "    return [None if finish == 'stop' else float(l) for l, finish in zip(level, finishes)]\n"
    )
    rows = [{"prompt": f"Say {i}.", "answer": 7, "solution": "yes", "level": 1 + i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = job(tmp_path, rewards=[f"{tmp_path / 'mine.py'}:seen"], train={"max_steps": 1},
               data={"train": str(tmp_path / "rows.jsonl"), "eval": None})  # fmt: skip
    run_job(made)
    assert {line["reward"] for line in lines(tmp_path / "run")} <= {None, 1.0, 2.0}
    assert 1 <= logged(tmp_path / "run", "rewards/seen/mean")[0] <= 2


def test_groups_of_equal_reward_are_asked_again_up_to_the_limit(tmp_path):
    """A reward that never differs: every round asks further prompts, none is of use, and there is nothing to train."""
    made = job(tmp_path, rewards=[{"kind": "regex", "pattern": ""}], rollout={"resample": 2}, train={"max_steps": 1})
    run_job(made)
    assert logged(tmp_path / "run", "rollout/resampled") == [6.0]  # 4 and the last 2 of 10
    assert logged(tmp_path / "run", "frac_reward_zero_std") == [1.0]
    assert losses(tmp_path / "run") == [0.0]


def test_cut_off_answers_can_be_left_out(tmp_path):
    run_job(job(tmp_path, rollout={"mask_truncated": True}, train={"max_steps": 1}))
    assert logged(tmp_path / "run", "completions/clipped_ratio")[0] > 0.9  # a random model does not end its answers
    assert logged(tmp_path / "run", "grad_norm")[0] < 1e-2


BAD = {
    "no rewards": ({"rewards": []}, ConfigError, "objective grpo needs one at least"),
    "rewards without use": ({"objective": "sft"}, ConfigError, "no use for rewards"),
    "one answer": ({"rollout": {"group": 1}}, ConfigError, "compares the answers"),
    "minibatches": ({"rollout": {"minibatches": 5}}, ConfigError, "5 minibatches cannot be made of 4 prompts"),
    "no function": ({"rewards": ["nowhere.py:f"]}, ConfigError, "there is no file .*nowhere.py"),
    "bad pattern": ({"rewards": [{"kind": "regex", "pattern": "("}]}, ConfigError, "is no regular expression"),
    "no truth": ({"rewards": ["exact"]}, RewardError, r"exact: .*prompts.jsonl:1: the row has no ground truth"),
    "streaming": ({"data": {"streaming": True}}, ConfigError, "keeps its prompts in memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said_before_anything_is_generated(tmp_path, name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run_job(job(tmp_path, **changes))
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


def test_a_reward_that_is_no_number_stops_the_run_and_names_the_row(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [float('nan')] * len(completions)\n")
    with pytest.raises(RewardError, match=r"f gave nan for an answer to .*prompts.jsonl:\d+: '"):
        run_job(job(tmp_path, rewards=[f"{tmp_path / 'mine.py'}:f"]))


def test_rows_without_a_question_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time."}\n')
    with pytest.raises(DataError, match="plain text"):
        run_job(job(tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "eval": None}))


def test_short_forms_of_rewards():
    made = load_job({"data": {"train": "x"}, "rewards": ["a.py:f", "tags", {"kind": "math", "weight": 2.0}]})
    assert [reward.kind for reward in made.rewards] == ["function", "tags", "math"] and made.rewards[2].weight == 2
    assert load_job({"data": {"train": "x"}, "rewards": "pkg.mod:f"}).rewards[0].path == "pkg.mod:f"
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        load_job({"data": {"train": "x"}, "rewards": "maths"})
    with pytest.raises(ConfigError, match=r"rewards: .*mine.py says no function; write mine.py:name_of_the_function"):
        load_job({"data": {"train": "x"}, "rewards": ["mine.py"]})
