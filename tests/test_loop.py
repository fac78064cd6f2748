"""Oracles: a step is the same however it is cut (float64); a run cut off goes on bit for bit; the files are those
that LLaMA-Factory's users have scripts for."""

from __future__ import annotations

import json
import math
import shutil
import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tiny_runs import final_weights, losses, same, tiny_job
from tunery.errors import ConfigError, DataError, ModelError, NonFiniteError
from tunery.loop import Interrupted, run_job
from tunery.models.load import resolve_name
from tunery.objectives import sft
from tunery.schedule import factor


def logged(output: str | Path, key: str) -> list[float]:
    """A number of every step of a run."""
    lines = [json.loads(line) for line in (Path(output) / "trainer_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


CUTS = {
    "one stream": {"micro_tokens": 100_000},
    "small streams": {"micro_tokens": 60},
    "smaller streams": {"micro_tokens": 30},
    "one by one": {"packing": False},
    "partly recomputed": {"checkpointing": "selective"},
    "recomputed": {"checkpointing": "full"},
}


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, "full"])
def test_the_step_does_not_depend_on_the_cut(tmp_path, adapter):
    curves, weights = [], []
    for number, train in enumerate(CUTS.values()):
        # no clipping: it would hide a gradient of the wrong size, and so does AdamW
        train = {**train, "max_grad_norm": None, "save_every": 6}
        output = str(tmp_path / f"run{number}")
        job = tiny_job(tmp_path, train=train, adapter=adapter, data={"eval": None}, output=output)
        run_job(job)
        curves.append(losses(job.output) + logged(job.output, "grad_norm"))
        weights.append(final_weights(Path(job.output)))
    assert len(curves[0]) == 12 and curves[0][5] < curves[0][0]
    assert 0.05 < curves[0][6] < 50  # the gradient of a mean over tokens, not of a sum of hundreds
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
    assert old["state"]
    for key, state in old["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(new["state"][key][k])) for k, v in state.items())


def test_the_best_checkpoint_may_be_in_the_folder_that_a_run_goes_on_from(tmp_path):
    first = tiny_job(tmp_path, train={"save_every": 2, "keep": 9})
    run_job(first)
    start = Path(first.output) / "checkpoint-4"
    state = json.loads((start / "tunery_state.json").read_text())
    state["best"] = {"step": 2, "loss": -1.0, "since": 1}
    (start / "tunery_state.json").write_text(json.dumps(state))
    rest = tmp_path / "rest"
    run_job(tiny_job(tmp_path, train={"save_every": 2, "keep": 9, "resume": str(start)}, output=str(rest)))
    assert same(rest, Path(first.output) / "checkpoint-2") and not same(rest, Path(first.output))


def test_the_learning_rate_is_the_schedules_and_the_gradient_is_clipped(tmp_path):
    job = tiny_job(tmp_path, adapter="full", schedule={"kind": "cosine", "warmup": 2}, train={"max_grad_norm": 1e-9})
    before = load_file(tmp_path / "model" / "model.safetensors")
    run_job(job)
    assert logged(job.output, "lr") == pytest.approx([1e-2 * factor(job.schedule, step, 6) for step in range(6)])
    free = tiny_job(tmp_path, adapter="full", train={"max_grad_norm": None}, output=str(tmp_path / "free"))
    run_job(free)

    def moved(output: str) -> float:
        after = final_weights(Path(output))
        return max(float((after[name] - before[name]).abs().max()) for name in after if name in before)

    # AdamW's step does not depend on the gradient's size unless it is as small as its epsilon of 1e-8
    assert moved(job.output) < 0.2 * moved(free.output)


def test_noise_differs_from_step_to_step(tmp_path):
    """The same rows each step, a learning rate that moves nothing: only the noise can change the loss."""
    job = tiny_job(
        tmp_path, optimizer={"lr": 1e-30}, train={"neftune": 5.0, "batch_size": 24, "max_steps": 3}, data={"eval": None}
    )
    run_job(job)
    assert len(set(losses(job.output))) == 3


def test_evaluation_is_by_tokens_and_without_dropout(tmp_path):
    """However the held-out rows are cut, their loss is one number; with dropout on it would not be."""
    found = []
    for number, tokens in enumerate((40, 100_000)):
        adapter = {"kind": "lora", "rank": 4, "dropout": 0.5}
        output = str(tmp_path / str(number))
        job = tiny_job(tmp_path, adapter=adapter, train={"micro_tokens": tokens, "max_steps": 1}, output=output)
        run_job(job)
        found.append(logged(output, "eval_loss")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_changed_rows_are_noticed(tmp_path):
    job = tiny_job(tmp_path, train={"save_every": 2})
    run_job(job)
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text().replace("alpha", "omega"))
    with pytest.raises(DataError, match="the train data have changed"):
        run_job(job)
    (Path(job.output) / "all_results.json").unlink()
    with pytest.raises(DataError, match="the train data have changed"):
        run_job(job)


def test_a_checkpoint_of_another_run_is_not_mixed_in(tmp_path):
    first = tiny_job(tmp_path)
    run_job(first)
    second = tiny_job(tmp_path, adapter="full", output=str(tmp_path / "second"))
    run_job(second)
    resume = {"resume": str(tmp_path / "second" / "checkpoint-6")}
    with pytest.raises(ConfigError, match="a run of its own"):
        run_job(tiny_job(tmp_path, adapter="full", train=resume))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval": {"patience": 2}, "data": {"eval": None}}, r"eval\.patience"),
        ({"eval": {"generate": 2}, "data": {"eval": None}}, r"eval\.generate"),
        ({"model": {"random_init": True}}, "fits no base"),
        ({"model": {"revision": "x"}}, "no revisions"),
    ],
)
def test_options_that_could_do_nothing_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run_job(tiny_job(tmp_path, **changes))


def test_weights_of_another_model_are_no_start(tmp_path):
    job = tiny_job(tmp_path, model={"init_from": resolve_name("builtin:tiny")})
    with pytest.raises(ModelError, match=r"model\.init_from: .*(model_type|vocab_size)"):
        run_job(job)


def test_an_adapter_as_the_model_is_explained(tmp_path):
    job = tiny_job(tmp_path)
    run_job(job)
    with pytest.raises(ConfigError, match=r"is an adapter; .*model\.init_from"):
        run_job(tiny_job(tmp_path, model={"name": job.output}, output=str(tmp_path / "other")))


def test_rows_longer_than_the_context_are_said_or_refused(tmp_path):
    job = tiny_job(tmp_path)
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "max_position_embeddings": 20}))
    run_job(job)
    assert "longer than the 20 tokens" in (Path(job.output) / "report.md").read_text()


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


# ---------------------------------------------------------------- Ctrl-C


def interrupt(monkeypatch, *at: int) -> None:
    """Ctrl-C in the middle of these training forwards, counted from 1."""
    plain, calls = sft.Objective.loss, []

    def loss(self, policy, batch):
        if torch.is_grad_enabled():
            calls.append(batch)
            for _ in range(at.count(len(calls))):
                signal.raise_signal(signal.SIGINT)
        return plain(self, policy, batch)

    monkeypatch.setattr(sft.Objective, "loss", loss)


def said_by(job) -> tuple[str, str]:
    """(what was printed, what the error says) of a run that is interrupted."""
    printed = StringIO()
    with pytest.raises(Interrupted) as error:
        run_job(job, Console(file=printed, width=200))
    return printed.getvalue(), str(error.value)


def test_the_first_ctrl_c_is_answered_at_once_and_saves(tmp_path, monkeypatch):
    job = tiny_job(tmp_path, train={"save_every": 100}, data={"eval": None})
    interrupt(monkeypatch, 3)
    printed, said = said_by(job)
    assert "stopping when a step is whole, with a checkpoint; Ctrl-C again" in printed
    assert said.startswith("interrupted after step 3/6; saved") and (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("save_every", [2, 100])
def test_the_second_stops_there_and_says_what_is_left(tmp_path, monkeypatch, save_every):
    changes = {"train": {"save_every": save_every, "keep": 9}, "data": {"eval": None}}
    job = tiny_job(tmp_path, **changes)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        interrupt(patched, 4, 4)
        _, said = said_by(job)
    assert said.startswith("interrupted twice: stopped at once")
    assert said.endswith(
        "go on from " + str(tmp_path / "run" / "checkpoint-2") if save_every == 2 else "no checkpoint yet"
    )
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    whole = tiny_job(tmp_path, **changes, output=str(tmp_path / "whole"))
    run_job(whole)
    run_job(job)  # the same command goes on, or begins anew
    assert losses(job.output) == losses(whole.output) and same(Path(job.output), Path(whole.output))
