"""ppo with `value: separate`. Oracles: gradients by the definition (float64), a model of its own loaded from what was
saved, and the same run however it is cut or resumed, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_rollouts import CUTS, job, lines, logged, weights

from tiny_runs import losses, model_folder, same
from tunery.engine import Engine
from tunery.errors import ConfigError
from tunery.generate.score import RewardModel
from tunery.loop import run_job
from tunery.objectives.ppo import value_losses
from tunery.read import read_data
from tunery.reference import measure_with_reference
from tunery.resolve import resolve
from tunery.setup import Run, set_up

PPO = {
    "objective": {"kind": "ppo", "value": "separate", "beta": 0.1, "score_norm": True, "value_weight": 0.5},
    "rollout": {"group": 1, "minibatches": 2, "iterations": 2},
}  # fmt: skip


def values(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "value" / "adapter_model.safetensors")


def started(folder: Path, **changes) -> Run:
    made = job(folder, **{**PPO, **changes})
    read, engine = read_data(made), Engine(made.model.dtype)
    run = set_up(resolve(made, engine, read), engine, read, None)
    measure_with_reference(run)
    return run


def stirred(run: Run) -> Run:
    torch.manual_seed(3)
    assert run.critic is not None
    for parameter in run.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return run


def gradients(run: Run, weight: float, batch) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Of the policy's and of the value's parameters."""
    assert run.critic is not None
    run.objective.config = run.objective.config.model_copy(update={"value_weight": weight})  # type: ignore[attr-defined]
    sets = [p for p in run.model.parameters() if p.requires_grad], list(run.critic.trained.values())
    for parameter in run.parameters:
        parameter.grad = None
    run.objective.loss(run.policy, batch).sum.backward()
    return tuple([p.grad if p.grad is None else p.grad.clone() for p in part] for part in sets)  # type: ignore


def test_no_gradient_of_one_comes_to_the_other(tmp_path):
    run = started(tmp_path)
    (batch,) = run.loader.step(0).micro
    stirred(run)
    alone, none = gradients(run, 0.0, batch)
    both, mine = gradients(run, 0.7, batch)
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(alone, both, strict=True))
    assert all(grad is None or not grad.any() for grad in none)
    assert run.critic is not None
    own = list(run.critic.trained.values())
    rows = batch.labelled_N
    v_N = run.critic.policy.values(batch, rows)
    total = 0.7 * value_losses(v_N, batch.extra["returns"][rows], batch.extra["values"][rows], 0.2)[0].sum()
    theirs = torch.autograd.grad(total, own)
    assert all(
        a is not None and torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(mine, theirs, strict=True)
    )
    assert max(float(grad.abs().max()) for grad in theirs) > 1e-4


def test_it_stands_on_the_policys_base_and_begins_as_it_with_values_of_0(tmp_path):
    run = started(tmp_path)
    assert run.critic is not None
    policys = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    apart = [n for n, p in run.critic.policy.model.named_parameters() if p.data_ptr() not in policys]
    assert apart and all(".lora_" in name or ".score." in name for name in apart)
    assert set(map(id, run.parameters)) == {
        id(p) for model in (run.model, run.critic.policy.model) for p in model.parameters() if p.requires_grad
    }
    (batch,) = run.loader.step(0).micro
    assert run.policy.logps_and_values(batch)[1].count_nonzero() == 0
    logps, found = stirred(run).policy.logps_and_values(batch)
    assert logps.equal(run.policy.logps(batch)) and found.count_nonzero() == len(batch.labelled_N)


def test_dropout_is_the_policys(tmp_path):
    """On in training, off where a rollout is measured."""
    run = stirred(started(tmp_path, adapter={"kind": "lora", "rank": 4, "dropout": 0.5}))
    (batch,) = run.loader.step(0).micro
    for training in (True, False):
        run.model.train(training)
        first, second = (run.policy.logps_and_values(batch)[1] for _ in range(2))
        assert first.equal(second) != training


def test_what_is_saved_is_a_model_of_its_own_and_the_adapter_has_nothing_of_it(tmp_path):
    run_job(job(tmp_path, **PPO))
    output = tmp_path / "run"
    assert (
        not [name for name in weights(output) if "score" in name] and not (output / "value_head.safetensors").exists()
    )
    assert max(float(v.abs().max()) for n, v in values(output).items() if "lora_B" in n) > 1e-3
    again = started(tmp_path, output=str(tmp_path / "again"), model={"init_from": str(output), "dtype": "float64"})
    (batch,) = again.loader.step(0).micro
    alone = RewardModel(output / "value", dtype="float64").policy
    assert again.critic is not None
    with torch.no_grad():
        assert again.critic(batch, training=False).equal(alone.values(batch, batch.labelled_N))


def test_the_steps_do_not_depend_on_the_cut(tmp_path):
    run_job(job(tmp_path, "whole", **PPO, train={"max_steps": 6}))
    whole = tmp_path / "whole"
    assert logged(whole, "values/mean")[-1] != 0
    for number, cut in enumerate(CUTS.values()):
        run_job(job(tmp_path, f"cut{number}", **PPO, train={"max_steps": 6, **cut["train"]}))
        other = tmp_path / f"cut{number}"
        assert [line["completion"] for line in lines(other)] == [line["completion"] for line in lines(whole)]
        assert losses(other) == pytest.approx(losses(whole), rel=1e-8, abs=1e-10)
        for read in (weights, values):
            for key, value in read(other).items():
                torch.testing.assert_close(value, read(whole)[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("at", [4, 6], ids=["between rollouts", "within one"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, at):
    changes = {
        **PPO, "model": {"dtype": "float32"}, "train": {"max_steps": 9, "save_every": 1, "keep": None},
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1},
    }  # fmt: skip
    run_job(job(tmp_path, "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in range(at + 1, 10):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "cut" / "value")
    for name in ("all_results.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    run_job(job(tmp_path, "cut", **changes))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and same(tmp_path / "cut", tmp_path / "whole")
    assert all(values(tmp_path / "cut")[k].equal(v) for k, v in values(tmp_path / "whole").items())


@pytest.mark.parametrize(
    ("adapter", "why"),
    [("full", "which adapter: full trains"), ({"kind": "lora", "init": "pissa"}, "adapter.init: pissa takes")],
)
def test_an_adapter_that_leaves_no_base_is_refused_before_the_model_loads(tmp_path, adapter, why, monkeypatch):
    monkeypatch.setattr("tunery.setup.load_start", lambda *_: pytest.fail("the model was loaded"))
    model_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"objective.value: separate .*{why}"):
        run_job(job(tmp_path, **PPO, adapter=adapter))


def test_a_plan_counts_two_models_that_train(tmp_path):
    from tunery.plan.command import plan_job

    shared, apart = (
        plan_job(job(tmp_path, objective={**PPO["objective"], "value": value}, rollout=PPO["rollout"]), "cpu")
        for value in ("shared", "separate")
    )
    adapter = shared.trainable * 4
    assert apart.memory.optimizer == 2 * shared.memory.optimizer
    assert apart.memory.weights - shared.memory.weights == adapter
    assert any("trains beside the policy's" in note for note in apart.notes)
