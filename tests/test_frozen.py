"""Oracles: the same job with every layer run in every epoch; a run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tunery.frozen
import tunery.loop
import tunery.plan.frozen_states
from processes import runs_on_two_ranks
from tiny_runs import losses, same, tiny_job
from tunery.errors import ConfigError
from tunery.frozen import begin_step
from tunery.job import Job
from tunery.loop import run_job
from tunery.models.boundary import FILE, MARK, Boundary
from tunery.policy import CausalPolicy
from tunery.read import read_data

TRAIN = {"epochs": 3, "micro_tokens": 60, "save_every": 1, "keep": None}


def job_of(folder: Path, name: str, cache: Any, dtype: str = "float64", **changes: Any) -> Job:
    train = {**TRAIN, **changes.pop("train", {})}
    adapter = {"kind": "freeze", "layers": 1, "cache": cache, **changes.pop("adapter", {})}
    return tiny_job(
        folder, output=str(folder / name), model={"dtype": dtype}, adapter=adapter, train=train,
        eval={"best": False}, **changes,
    )  # fmt: skip


def notes(job: Job) -> str:
    return (Path(job.output) / "report.md").read_text()


@pytest.mark.parametrize(("dtype", "rel"), [("float64", 1e-11), ("float32", 1e-5)])
def test_three_epochs_lose_the_same_with_and_without(tmp_path, dtype, rel, monkeypatch):
    reads = []
    give = Boundary._give
    monkeypatch.setattr(Boundary, "_give", lambda self, *args: reads.append(1) or give(self, *args))
    jobs = [job_of(tmp_path, f"cache {cache}", cache, dtype) for cache in (False, True, "auto")]
    for job in jobs:
        run_job(job)
    plain, kept, auto = (losses(job.output) for job in jobs)
    assert len(plain) == 9 and plain[8] < plain[0] and reads
    assert kept == pytest.approx(plain, rel=rel) and auto == kept
    assert "frozen" not in notes(jobs[0])
    for job in jobs[1:]:
        assert "later ones begin with what they gave" in notes(job)
        assert not (Path(job.output) / FILE).exists() and not (Path(job.output) / MARK).exists()


class Killed(Exception):
    pass


def kill_before(step: int, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    """Leave the run without another word before a step's (0-based) first forward."""

    def begin(run: Any, number: int) -> None:
        if number == step:
            raise Killed
        begin_step(run, number)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tunery.loop, "begin_step", begin)
        run_job(job)


def round_by_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a sequence depends on the stream it was in, by parts in 1e11 in place of the last bit."""
    keep = Boundary._keep
    monkeypatch.setattr(
        Boundary, "_keep", lambda self, spans, hidden: keep(self, spans, hidden * (1 + 1e-11 * (len(hidden) % 7)))
    )


@pytest.mark.parametrize("file", ["there", "gone"])
@pytest.mark.parametrize("at", [[1], [2], [5], [1, 3, 8]], ids=str)
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, monkeypatch, at, file):
    """Three steps an epoch."""
    round_by_stream(monkeypatch)
    whole, cut = (job_of(tmp_path, name, True) for name in ("whole", "cut"))
    run_job(whole)
    for step in at:
        kill_before(step, monkeypatch, cut)
        folder = Path(cut.output)
        assert (folder / FILE).is_file() and (folder / MARK).read_text() == str(min(step, 3))
        if file == "gone":
            for name in (FILE, MARK):
                (folder / name).unlink(missing_ok=True)
    calls = []
    run_frozen = CausalPolicy.run_frozen
    monkeypatch.setattr(CausalPolicy, "run_frozen", lambda *args: calls.append(1) or run_frozen(*args))
    run_job(cut)
    assert (len(calls) == 3) == (file == "there")  # the probe's alone
    assert losses(cut.output) == losses(whole.output) and len(losses(cut.output)) == 9
    assert same(Path(cut.output), Path(whole.output))


def test_a_checkpoint_elsewhere_goes_on_the_same(tmp_path, monkeypatch):
    """Without the file, what the first epoch computed is computed again."""
    round_by_stream(monkeypatch)
    whole = job_of(tmp_path, "whole", True)
    run_job(whole)
    checkpoint = Path(whole.output) / "checkpoint-5"
    other = job_of(tmp_path, "other", True, train={"resume": str(checkpoint)})
    run_job(other)
    assert losses(other.output) == losses(whole.output)[5:]


def test_a_resumed_run_goes_on_as_it_began(tmp_path, monkeypatch):
    """Whatever is asked for now, or would pay now: the last bits would change in the middle."""
    whole = job_of(tmp_path, "whole", False)
    run_job(whole)
    cut = job_of(tmp_path, "cut", False)
    kill_before(5, monkeypatch, cut)
    changed = job_of(tmp_path, "cut", True)
    run_job(changed)
    assert losses(cut.output) == losses(whole.output) and not (Path(cut.output) / FILE).exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one epoch": ({"train": {"epochs": 1}}, "sees each row once"),
    "few steps": ({"train": {"max_steps": 3}}, "sees each row once"),
    "noise": ({"train": {"neftune": 5.0}}, "neftune"),
    "trained below": ({"adapter": {"layers": -1}}, "the first layer trains"),
    "embeddings": ({"adapter": {"extra": ["embed_tokens"]}}, "before the first trained layer"),
    "streamed": ({"data": {"streaming": True, "eval": None}, "train": {"max_steps": 9}}, "streamed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_is_not_exact_or_useless_every_epoch_runs_everything(tmp_path, case):
    changes, why = REFUSED[case]
    auto = job_of(tmp_path, "auto", "auto", **changes)
    run_job(auto)
    assert why in notes(auto) and not (Path(auto.output) / FILE).exists()
    with pytest.raises(ConfigError, match=f"adapter.cache.*{why}"):
        run_job(job_of(tmp_path, "asked", True, **changes))


def test_auto_looks_at_the_room_and_the_gain(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tunery.plan.frozen_states, "PAYS", 0.5)
        job = job_of(tmp_path, "gain", "auto")
        run_job(job)
        assert "would save no more than" in notes(job)
    with monkeypatch.context() as patch:
        patch.setattr(tunery.frozen, "free_memory", lambda: 1000)
        job = job_of(tmp_path, "memory", "auto")
        run_job(job)
        assert "of memory are free" in notes(job)
        run_job(job_of(tmp_path, "memory, asked for", True))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(tunery.frozen.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ConfigError, match="free"):
            run_job(job_of(tmp_path, "disk", True))


def test_the_share_saved_is_that_of_the_arithmetic(tmp_path, monkeypatch):
    """One of two layers is frozen, two of three epochs pass it over: by hand, with 2 operations a parameter forward,
    6 where it trains (all of it counted from the frozen layer's and the head's own matrices)."""
    shares = []
    monkeypatch.setattr(tunery.loop, "skipped_flops", lambda run: shares.append(tunery.frozen.skipped_flops(run)) or 0)
    job = job_of(tmp_path, "run", True, data={"train": str(tmp_path / "train.jsonl")})
    run_job(job)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    store: Any = read_data(job).data.train
    lengths = store.lengths
    labelled, mean = store.labelled.sum() / lengths.sum(), (lengths**2).sum() / lengths.sum()
    vocabulary = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    attention = 4 * 32 * mean / 2
    frozen = 2 * layer + attention
    whole = frozen + 6 * layer + 3 * attention + labelled * 4 * vocabulary * 32
    assert shares == [pytest.approx(frozen / whole * 2 / 3)]


def test_other_adapters_have_nothing_to_keep(tmp_path):
    job = tiny_job(tmp_path, adapter={"kind": "lora", "rank": 4}, train={"epochs": 1})
    run_job(job)
    assert "frozen" not in notes(job)


@pytest.mark.slow
def test_two_ranks_share_the_file(tmp_path):
    """Each reads what the other kept: a row goes to another rank in another epoch."""
    adapter = {"kind": "freeze", "layers": 1, "cache": True}
    train = {"epochs": 3, "batch_size": 7, "micro_tokens": 60}
    run_job(tiny_job(tmp_path, adapter={**adapter, "cache": False}, train=train, output=str(tmp_path / "one")))
    two = tiny_job(tmp_path, adapter=adapter, train=train, output=str(tmp_path / "two"))
    status, text = runs_on_two_ranks(tmp_path, two)
    assert status == 0, text
    assert "later ones begin with what they gave" in (tmp_path / "two" / "report.md").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-11)
    assert not (tmp_path / "two" / FILE).exists()
