"""Oracles: a step is the same however it is cut (float64); a run cut off goes on bit for bit; the files are those
that LLaMA-Factory's users have scripts for."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import losses, tiny_job
from tunery.errors import ConfigError, NonFiniteError
from tunery.loop import run_job


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (output / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(output / name)


def same(a: Path, b: Path) -> bool:
    x, y = final_weights(a), final_weights(b)
    return x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


CUTS = {
    "one stream": {"micro_tokens": 100_000},
    "small streams": {"micro_tokens": 60},
    "smaller streams": {"micro_tokens": 30},
    "one by one": {"packing": False},
    "recomputed": {"checkpointing": True},
}


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, "full"])
def test_the_step_does_not_depend_on_the_cut(tmp_path, adapter):
    curves, weights = [], []
    for number, train in enumerate(CUTS.values()):
        job = tiny_job(tmp_path, train=train, adapter=adapter, output=str(tmp_path / f"run{number}"))
        run_job(job)
        curves.append(losses(job.output))
        weights.append(final_weights(Path(job.output)))
    assert len(curves[0]) == 6 and curves[0][-1] < curves[0][0]
    for curve, weight in zip(curves[1:], weights[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-11)
        for name, value in weight.items():
            # LoRA and full weights are float64 here in training; the files hold what was trained
            torch.testing.assert_close(value, weights[0][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_runs_of_both_objectives_leave_the_usual_files(tmp_path, objective):
    changes = {}
    if objective == "pretrain":
        (tmp_path / "text.txt").write_text("".join(f"alpha {i} beta\n" for i in range(30)), encoding="utf-8")
        changes = {"data": {"train": str(tmp_path / "text.txt"), "eval": 0.2}, "objective": "pretrain"}
    job = tiny_job(tmp_path, **changes)
    result = run_job(job)
    output = Path(job.output)
    for name in (
        "tunery.yaml", "trainer_log.jsonl", "train_results.json", "eval_results.json", "all_results.json",
        "trainer_state.json", "training_loss.png", "training_eval_loss.png", "report.md", "adapter_config.json",
        "adapter_model.safetensors", "tokenizer.json", "data_refused.jsonl",
    ):  # fmt: skip
        assert (output / name).is_file(), name
    assert result.metrics["train_loss"] > 0 and result.metrics["eval_loss"] > 0
    log = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time"} <= set(log[1])
    assert sum("eval_loss" in line for line in log) == 3  # before, and after each epoch


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "train": {"neftune": 5.0}},
        {"adapter": {"kind": "lora", "rank": 4, "init": "pissa"}, "model": {"dtype": "float32"}},
        {"adapter": "full", "model": {"dtype": "bfloat16"}},
        {"adapter": {"kind": "freeze", "layers": 1}, "model": {"dtype": "bfloat16"}},
    ],
    ids=["dropout and noise", "pissa", "full bf16", "freeze bf16"],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, changes):
    whole = tiny_job(tmp_path, **{**changes, "train": {"save_every": 2, "keep": 9, **changes.get("train", {})}})
    run_job(whole)
    cut = tmp_path / "cut"
    shutil.copytree(whole.output, cut)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / name)
    for name in ("all_results.json", "adapter_model.safetensors", "model.safetensors"):
        (cut / name).unlink(missing_ok=True)
    resumed = whole.model_copy(update={"output": str(cut)})
    run_job(resumed)
    assert losses(cut) == losses(whole.output)
    assert same(cut, Path(whole.output))
    old, new = (torch.load(Path(o) / "checkpoint-6" / "optimizer.pt") for o in (whole.output, cut))
    for key, state in old["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(new["state"][key][k])) for k, v in state.items())


def test_a_finished_run_is_not_run_again_and_another_is_not_mixed_in(tmp_path):
    job = tiny_job(tmp_path)
    run_job(job)
    assert run_job(job).already_finished
    with pytest.raises(ConfigError, match=r"optimizer\.lr differ"):
        run_job(tiny_job(tmp_path, optimizer={"lr": 1e-3}))
    again = tiny_job(tmp_path, optimizer={"lr": 1e-3}, train={"resume": False})
    assert not run_job(again).already_finished
    assert (tmp_path / "run.old-1" / "all_results.json").is_file()


def test_the_best_weights_win_and_patience_stops(tmp_path):
    """At this learning rate the evaluation loss turns up; the run ends with the weights from before it did."""
    job = tiny_job(
        tmp_path, adapter="full", model={"dtype": "float32"}, optimizer={"lr": 0.05},
        train={"epochs": 8, "keep": 1}, eval={"every": 1, "patience": 3},
    )  # fmt: skip
    result = run_job(job)
    log = [json.loads(line) for line in (Path(job.output) / "trainer_log.jsonl").read_text().splitlines()]
    evaluations = {line["current_steps"]: line["eval_loss"] for line in log if "eval_loss" in line}
    best = min((s for s in evaluations if s), key=evaluations.__getitem__)
    assert result.step == best and max(evaluations) == best + 3 < 24
    assert result.metrics["eval_loss"] == pytest.approx(evaluations[best])
    at_best = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    final = final_weights(tmp_path / "run")
    assert all(final[k].equal(at_best[k]) for k in final)


def test_init_from_starts_fresh_from_trained_weights(tmp_path):
    first = tiny_job(tmp_path)
    run_job(first)
    for number, adapter in enumerate(("lora", "full")):
        output = tmp_path / f"second{number}"
        job = tiny_job(
            tmp_path, model={"init_from": first.output}, adapter=adapter, optimizer={"lr": 1e-9}, output=str(output),
            train={"max_steps": 1},
        )  # fmt: skip
        result = run_job(job)
        expected = json.loads((Path(first.output) / "eval_results.json").read_text())["eval_loss"]
        assert result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_can_be_replayed(tmp_path):
    from tunery.replay import replay

    job = tiny_job(tmp_path, adapter="full", model={"dtype": "float32"})
    weights = load_file(tmp_path / "model" / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    weights[key][3, 2] = math.inf
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"step 1: .*not updated[\s\S]*up_proj[\s\S]*train\.jsonl:\d+") as error:
        run_job(job)
    assert "tunery replay" in str(error.value)
    assert not list(Path(job.output).glob("checkpoint-*"))
    lines = list(replay(Path(job.output)))
    assert any("up_proj" in line for line in lines[lines.index("now:") :])


def test_streaming_needs_steps_and_trains(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.max_steps"):
        run_job(tiny_job(tmp_path, data={"streaming": True}))
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "no answer"}]}\n')
    job = tiny_job(tmp_path, data={"streaming": True}, train={"max_steps": 4, "save_every": 2})
    run_job(job)
    whole = losses(job.output)
    shutil.rmtree(Path(job.output) / "checkpoint-4")
    (Path(job.output) / "all_results.json").unlink()
    run_job(job)
    assert losses(job.output) == whole and len(whole) == 4
    in_order = tiny_job(
        tmp_path, data={"streaming": True}, train={"max_steps": 1, "shuffle": False}, output=str(tmp_path / "in_order")
    )
    run_job(in_order)
    listed = tiny_job(tmp_path, train={"max_steps": 1, "shuffle": False}, output=str(tmp_path / "listed"))
    run_job(listed)
    assert losses(in_order.output) == losses(listed.output)
    assert "no assistant turn" in (Path(job.output) / "data_refused.jsonl").read_text()
