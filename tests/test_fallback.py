"""Oracle: the run whose memory never ran out. Here memory runs out when an objective says so, as torch says it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from processes import job_file, runs_on_two_ranks, train_on_two_ranks
from tiny_runs import final_weights, losses, same, tiny_job, write_rows
from tunery import fallback, loop
from tunery.checkpoint import load_state
from tunery.errors import OutOfMemoryError
from tunery.evaluate import held_out
from tunery.fallback import Rung, attempt, out_of_memory, resumed
from tunery.job import load_job
from tunery.loop import run_job
from tunery.models.parts import layer_list
from tunery.objectives import sft
from tunery.types import Batch

RUNGS = ("none", "selective", "full")


def test_the_rungs_in_their_order():
    rung, taken = Rung(100_000, "none"), []
    while rung is not None:
        taken.append((rung.micro_tokens, rung.checkpointing))
        rung = rung.below(1000, longest=200, packing=True, rungs=RUNGS)
        # what ran out was a stream of 1,000 tokens: half of 100,000 would cut nothing
    assert taken == [
        (100_000, "none"), (500, "none"), (250, "none"), (200, "none"), (200, "selective"), (200, "full"),
    ]  # fmt: skip
    one_each = Rung(500, "none").below(400, longest=400, packing=False, rungs=RUNGS)
    assert one_each == Rung(500, "selective")
    assert Rung(500, "offload").below(400, longest=500, packing=True, rungs=RUNGS) is None


def test_what_running_out_of_memory_looks_like():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 58)
    said = [RuntimeError(text) for text in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling")]
    for error in (refused.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to"), *said):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("out of memory"))


def test_an_attempt_gives_back_what_it_held():
    made = []

    def greedy() -> None:
        tensor = torch.ones(1000)
        made.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        assert attempt(greedy) is None and made[0]() is None
    finally:
        gc.enable()
    assert attempt(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(lambda: _raise(RuntimeError("shapes do not match")))


def _raise(error: Exception) -> None:
    raise error


def limit(monkeypatch, runs_out: Callable[[Any, Batch], bool]) -> list[tuple[int, bool]]:
    """Memory that runs out when `runs_out` says so; returns (tokens, whether it ran out) of each training forward."""
    plain, seen = sft.Objective.loss, []

    def loss(self: Any, policy: Any, batch: Batch) -> Any:
        out = torch.is_grad_enabled() and runs_out(policy, batch)
        if torch.is_grad_enabled():
            seen.append((batch.n_tokens, out))
        if out:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, policy, batch)

    monkeypatch.setattr(sft.Objective, "loss", loss)
    return seen


def rung_of(policy: Any) -> str:
    forward = layer_list(policy.model)[1][0].forward
    return getattr(forward, "rung", "none")


def report_of(output: str | Path) -> str:
    return (Path(output) / "report.md").read_text()


def fallen_to(output: str | Path) -> dict[str, Any] | None:
    newest = max(Path(output).glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return load_state(newest)["fallen_to"]


@pytest.fixture
def plain(tmp_path):
    """A run with all the memory it wants: one stream a step, of more than a hundred tokens."""
    job = tiny_job(tmp_path, train={"micro_tokens": 100_000}, output=str(tmp_path / "plain"))
    run_job(job)
    return job


def close(job: Any, plain: Any) -> None:
    assert losses(job.output) == pytest.approx(losses(plain.output), rel=1e-11)
    one, other = final_weights(Path(job.output)), final_weights(Path(plain.output))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("streaming", [False, True])
def test_smaller_streams_and_the_same_steps(tmp_path, plain, monkeypatch, streaming):
    if streaming:
        plain = tiny_job(
            tmp_path, data={"streaming": True}, train={"micro_tokens": 100_000, "max_steps": 6},
            output=str(tmp_path / "streamed"),
        )  # fmt: skip
        run_job(plain)
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    job = plain.model_copy(update={"output": str(tmp_path / "run")})
    run_job(job)
    close(job, plain)
    assert 1 <= sum(out for _, out in seen) <= 3 and all(tokens <= 100 for tokens, _ in seen[-8:])
    fallen = fallen_to(job.output)
    assert fallen is not None and fallen["micro_tokens"] < 200 and fallen["checkpointing"] == "none"
    assert "memory ran out in step 1" in report_of(job.output) and "same result" in report_of(job.output)


@pytest.mark.parametrize(
    "changes",
    [{"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}}, {"train": {"neftune": 5.0, "micro_tokens": 100_000}}],
    ids=["dropout", "noise"],
)
def test_streams_cut_anew_draw_anew_and_that_is_said(tmp_path, monkeypatch, changes):
    job = tiny_job(tmp_path, **{"train": {"micro_tokens": 100_000, "max_steps": 1}, **changes})
    limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    run_job(job)
    assert "drawn anew" in report_of(job.output) and "same result" not in report_of(job.output)


def test_recomputing_draws_what_was_drawn_and_that_is_said(tmp_path, monkeypatch):
    changes = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "train": {"packing": False, "max_steps": 2}}
    plain = tiny_job(tmp_path, **changes, output=str(tmp_path / "plain"))
    run_job(plain)
    limit(monkeypatch, lambda policy, batch: rung_of(policy) != "full")
    job = plain.model_copy(update={"output": str(tmp_path / "run")})
    run_job(job)
    close(job, plain)
    assert "(same result)" in report_of(job.output) and "drawn anew" not in report_of(job.output)


def test_activations_made_again_when_streams_cannot_be_smaller(tmp_path, plain, monkeypatch):
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 20 and rung_of(policy) != "full")
    job = plain.model_copy(update={"output": str(tmp_path / "run")})
    run_job(job)
    close(job, plain)
    fallen = fallen_to(job.output)
    assert fallen is not None and fallen["checkpointing"] == "full"
    assert fallen["micro_tokens"] == max(tokens for tokens, out in seen if not out) > 20


def test_memory_that_runs_out_halfway_through_a_step_leaves_nothing_of_it(tmp_path, plain, monkeypatch):
    """The gradients of the streams before are in place by then, and the numbers of the step before are read."""
    calls = []

    def at_the_eighth(policy: Any, batch: Batch) -> bool:
        calls.append(batch.n_tokens)
        return len(calls) == 8

    limit(monkeypatch, at_the_eighth)
    job = plain.model_copy(update={"output": str(tmp_path / "run")})
    job = job.model_copy(update={"train": job.train.model_copy(update={"micro_tokens": 60})})
    run_job(job)
    close(job, plain)
    assert "memory ran out in step 3" in report_of(job.output) or "memory ran out in step 2" in report_of(job.output)


def test_at_the_end_of_the_rungs_one_error_says_what_to_change(tmp_path, monkeypatch):
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 20)
    with pytest.raises(OutOfMemoryError, match=r"in step 1, .*checkpointing full.*data\.max_length") as error:
        run_job(tiny_job(tmp_path))
    assert "adapter: lora" not in str(error.value) and all(out for tokens, out in seen if tokens > 20)
    with pytest.raises(OutOfMemoryError, match="adapter: lora"):
        run_job(tiny_job(tmp_path, adapter="full", output=str(tmp_path / "full")))


def test_elsewhere_memory_running_out_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "set_up", lambda *_: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nx")))
    with pytest.raises(OutOfMemoryError, match=r"not on the streams of a step: CUDA out of memory. Tried 2 GiB\. Take"):
        run_job(tiny_job(tmp_path))


def test_a_resumed_run_goes_on_where_it_had_fallen_to(tmp_path, monkeypatch):
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    changes = {"train": {"micro_tokens": 100_000, "save_every": 2, "keep": 9}}
    whole = tiny_job(tmp_path, adapter={"kind": "lora", "rank": 4, "dropout": 0.2}, **changes)
    run_job(whole)
    cut = tmp_path / "cut"
    shutil.copytree(whole.output, cut)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / name)
    for name in ("all_results.json", "adapter_model.safetensors"):
        (cut / name).unlink()
    assert any(out for _, out in seen)
    seen.clear()
    run_job(whole.model_copy(update={"output": str(cut)}))
    assert seen and not any(out for _, out in seen)
    assert losses(cut) == losses(whole.output) and same(cut, Path(whole.output))
    assert fallen_to(cut) == fallen_to(whole.output)


def test_what_was_asked_for_below_the_rung_of_a_checkpoint_stays(tmp_path):
    job = tiny_job(tmp_path, train={"micro_tokens": 64, "checkpointing": "full"})
    state = {"fallen_to": {"micro_tokens": 500, "checkpointing": "selective"}}
    train = resumed(job, state).train
    assert (train.micro_tokens, train.checkpointing) == (64, "full") and resumed(job, {}) is job
    assert resumed(job, {"fallen_to": None}) is job


# ---------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "train": {"neftune": 5.0, "micro_tokens": 60}},
        {"adapter": "full", "model": {"dtype": "bfloat16"}},
        {"data": {"streaming": True}, "train": {"max_steps": 4}},
    ],
    ids=["dropout and noise", "full bf16", "streaming"],
)
def test_a_rehearsed_run_is_the_same_bit_for_bit(tmp_path, monkeypatch, changes):
    showing = {"generate": 2, "max_new_tokens": 4}
    plain = tiny_job(tmp_path, **changes, eval=showing, output=str(tmp_path / "plain"))
    run_job(plain)
    monkeypatch.setattr(loop, "REHEARSED", ("cpu",))
    job = tiny_job(tmp_path, **changes, eval=showing)
    run_job(job)
    assert losses(job.output) == losses(plain.output) and same(Path(job.output), Path(plain.output))
    states = [torch.load(Path(j.output) / f"checkpoint-{len(losses(j.output))}" / "optimizer.pt") for j in (plain, job)]
    assert states[0]["state"]
    for key, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in state.items())


def test_the_rehearsal_is_of_the_largest_stream_and_everything_after_is_cut_to_fit(tmp_path, monkeypatch):
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    evaluated = []
    plain_streams = held_out.evaluation_steps

    def streams(store: Any, how: Any) -> Any:
        evaluated.append(how.budget)
        return plain_streams(store, how)

    monkeypatch.setattr(held_out, "evaluation_steps", streams)
    monkeypatch.setattr(loop, "REHEARSED", ("cpu",))
    job = tiny_job(tmp_path, train={"micro_tokens": 100_000})
    write_rows(tmp_path / "train.jsonl", 24)
    run_job(job)
    assert "memory ran out in the rehearsal" in report_of(job.output)
    rehearsed = [tokens for tokens, out in seen if out]
    assert rehearsed == sorted(rehearsed, reverse=True) and not any(out for _, out in seen[len(rehearsed) :])
    fallen = fallen_to(job.output)
    assert fallen is not None and set(evaluated) == {fallen["micro_tokens"]} and fallen["micro_tokens"] <= 100
    # the largest of all was rehearsed: nothing in the run is larger
    assert seen[len(rehearsed)][0] == max(tokens for tokens, _ in seen[len(rehearsed) :])


def test_a_rehearsal_has_the_moments_in_place_and_leaves_no_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "REHEARSED", ("cpu",))
    plain, found = fallback._once, []

    def once(run: Any, *rest: Any) -> bool:
        done = plain(run, *rest)
        found.append([(len(run.optimizer.state[p]), float(run.optimizer.state[p]["step"])) for p in run.parameters])
        return done

    def before(run: Any, report: Any, gate: Any) -> None:
        rehearse(run, report, gate)
        assert all(p.grad is None for p in run.parameters)

    rehearse = loop.rehearse
    monkeypatch.setattr(fallback, "_once", once)
    monkeypatch.setattr(loop, "rehearse", before)
    run_job(tiny_job(tmp_path, train={"max_steps": 1}))
    assert len(found) == 1 and set(found[0]) == {(3, 0.0)}


# ---------------------------------------------------------------- ranks

LIMITED = '''
import math, os, torch
from tunery.objectives import sft
from tunery.types import Loss


class Config(sft.Config):
    kind: str = "outside.limited"
    tokens: int = 0
    broken: bool = False


class Objective(sft.Objective):
    """Rank 1 has memory for `tokens` tokens (0: for all), and no finite loss where it is `broken`."""

    def loss(self, policy, batch):
        mine = torch.is_grad_enabled() and os.environ.get("RANK") == "1"
        if mine and 0 < self.config.tokens < batch.n_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = super().loss(policy, batch)
        # a number beside the gradients, so that these do not tell the other rank
        return Loss(loss.sum + math.inf, loss.metrics) if mine and self.config.broken else loss
'''


@pytest.fixture
def two_ranks(tmp_path):
    """A job file with the objective above, which two processes find."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "limited.py").write_text(LIMITED)
    sys.path.insert(0, str(tmp_path))  # the job is checked here before it is written
    path = job_file(tmp_path, objective={"kind": "outside.limited"}, train={"batch_size": 7, "micro_tokens": 300})
    os.environ["PYTHONPATH"] = str(tmp_path)

    yield path
    sys.path.remove(str(tmp_path))
    del os.environ["PYTHONPATH"]


@pytest.mark.slow
def test_two_ranks_fall_together(tmp_path, two_ranks):
    jobs = [
        load_job(two_ranks, [f"output={tmp_path / name}", f"objective.tokens={tokens}"])
        for name, tokens in (("free", 0), ("limited", 90))
    ]
    status, text = runs_on_two_ranks(tmp_path, *jobs)
    assert status == 0, text
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "free"), rel=1e-11)
    fallen = fallen_to(tmp_path / "limited")
    assert fallen is not None and fallen["micro_tokens"] <= 90 and fallen_to(tmp_path / "free") is None
    assert "memory ran out in step" in report_of(tmp_path / "limited")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_holds_back_both(tmp_path, two_ranks):
    status, text = train_on_two_ranks(two_ranks, f"output={tmp_path / 'broken'}", "objective.broken=true")
    assert status == 1 and "step 1: the loss or gradient is not finite" in text
    kept = load_file(tmp_path / "broken" / "failure-step-1" / "adapter_model.safetensors")
    updates = [value for name, value in kept.items() if "lora_B" in name]
    assert updates and all(value.eq(0).all() for value in updates)
