"""Whole runs of ppo. Oracles: the same run however it is cut, resumed (bit for bit) or spread over ranks; a reward that
a bandit could learn."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rollouts import CUTS, job, lines, logged, weights

from processes import runs_on_two_ranks
from tiny_runs import losses
from tunery.loop import run_job
from tunery.models.value_head import FILE

PPO = {
    "objective": {"kind": "ppo", "beta": 0.1, "kl_target": 0.01, "kl_horizon": 50, "score_norm": True,
                  "whiten_rewards": True},
    "rollout": {"group": 1, "minibatches": 2, "iterations": 2},
}  # fmt: skip


def head(output: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(output) / FILE)


def test_the_steps_do_not_depend_on_the_cut(tmp_path):
    more = {"train": {"max_steps": 6}}
    run_job(job(tmp_path, "whole", **PPO, **more))
    whole = tmp_path / "whole"
    assert head(whole)["weight"].abs().max() > 1e-3 and len(set(logged(whole, "beta"))) == 2
    for number, cut in enumerate(CUTS.values()):
        run_job(job(tmp_path, f"cut{number}", **PPO, train={**more["train"], **cut["train"]}))
        other = tmp_path / f"cut{number}"
        assert [line["completion"] for line in lines(other)] == [line["completion"] for line in lines(whole)]
        assert losses(other) == pytest.approx(losses(whole), rel=1e-8, abs=1e-10)
        for found, expected in ((weights(other), weights(whole)), (head(other), head(whole))):
            for key, value in found.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("at", [4, 6], ids=["between rollouts", "within one"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, at):
    changes = {**PPO, "model": {"dtype": "float32"}, "train": {"max_steps": 9, "save_every": 1, "keep": None}}
    run_job(job(tmp_path, "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(at + 1, 10):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    for name in ("all_results.json", "adapter_model.safetensors", FILE):
        (tmp_path / "cut" / name).unlink()
    run_job(job(tmp_path, "cut", **changes))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert logged(tmp_path / "cut", "beta") == logged(tmp_path / "whole", "beta")
    for read in (weights, head):
        assert all(read(tmp_path / "cut")[k].equal(v) for k, v in read(tmp_path / "whole").items())


def test_a_run_starts_from_the_value_head_of_where_it_starts(tmp_path):
    run_job(job(tmp_path, "one", **PPO))
    start = {"dtype": "float32", "init_from": str(tmp_path / "one")}
    run_job(job(tmp_path, "two", **PPO, model=start, train={"max_steps": 1}, optimizer={"kind": "adamw", "lr": 1e-12}))
    assert head(tmp_path / "two")["weight"].numpy() == pytest.approx(head(tmp_path / "one")["weight"].numpy(), abs=1e-9)
    assert "value_head" not in "".join(weights(tmp_path / "one"))  # what is served is without it


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    made = job(tmp_path, "one", **PPO, train={"max_steps": 6})
    run_job(made)
    status, text = runs_on_two_ranks(tmp_path, made.model_copy(update={"output": str(tmp_path / "two")}))
    assert status == 0, text
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-8, abs=1e-10)
    for key in ("beta", "kl", "explained_variance", "returns/mean"):
        assert logged(tmp_path / "two", key) == pytest.approx(logged(tmp_path / "one", key), rel=1e-9), key
    for found, expected in ((weights(tmp_path / "two"), weights(tmp_path / "one")),
                            (head(tmp_path / "two"), head(tmp_path / "one"))):  # fmt: skip
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
