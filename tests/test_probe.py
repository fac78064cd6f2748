"""Oracle: the run, and memory that runs out when an objective says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from test_fallback import limit
from tiny_runs import tiny_job
from tunery import probe as probing
from tunery.devices import this_device
from tunery.errors import OutOfMemoryError
from tunery.plan import command
from tunery.plan.bill import Measured
from tunery.plan.command import plan_job
from tunery.probe import probe
from tunery.read import read_data


def quiet_job(folder: Any, **train: Any) -> Any:
    return tiny_job(folder, model={"dtype": "float32"}, train={"micro_tokens": None, **train})


def test_steps_after_a_fall_are_those_that_count(tmp_path, monkeypatch):
    job = quiet_job(tmp_path, checkpointing="none")
    seen = limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    measured = probe(job, read_data(job), 2048, "none")
    assert measured.fell_to is not None and measured.fell_to[0] <= 200 and measured.fell_to[1] == "none"
    assert any(out for _, out in seen) and len(measured.streams) == len(measured.seconds) == 3
    assert all(tokens <= 100 for streams in measured.streams for tokens in streams)
    sizes = [size for size, _ in seen[-sum(map(len, measured.streams)) :]]
    assert sizes == [tokens for streams in measured.streams for tokens in streams]


def test_a_probe_that_did_not_fall_says_nothing_of_it(tmp_path):
    job = quiet_job(tmp_path)
    assert probe(job, read_data(job), 2048, "none", steps=2).fell_to is None


def test_the_plan_is_of_the_rung_that_was_left(tmp_path, monkeypatch):
    limit(monkeypatch, lambda policy, batch: batch.n_tokens > 100)
    plan = plan_job(quiet_job(tmp_path, checkpointing="none"), probing=True)
    assert plan.micro_tokens <= 200 and plan.times == "corrected"
    (note,) = [note for note in plan.notes if note.startswith("--probe: memory ran out")]
    assert "2,048 tokens, checkpointing none" in note


def test_no_memory_while_loading_is_said_and_the_plan_is_there(tmp_path, monkeypatch):
    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    job = quiet_job(tmp_path)
    monkeypatch.setattr(probing, "set_up", load)
    with pytest.raises(OutOfMemoryError, match="memory ran out, and not on the streams of a step: CUDA out of memory"):
        probe(job, read_data(job), 2048, "none")
    plan = plan_job(job, probing=True)
    assert not plan.fits and plan.ladder and plan.times == "estimate"
    assert "--probe: memory ran out" in plan.notes[-1] and "and more" not in plan.notes[-1]


def test_where_the_corrected_plan_does_not_fit_the_ladder_is_built_anew(tmp_path, monkeypatch):
    """The plan's own numbers fit; a process that took ten bytes more than there are does not."""
    here = this_device("cpu")
    monkeypatch.setattr(command, "this_device", lambda: here)
    job = quiet_job(tmp_path)
    before = plan_job(job)
    assert before.fits and before.ladder == []
    peak = before.device_memory + 10

    def measured(*_: Any) -> Measured:
        return Measured([[300]] * 3, [0.1] * 3, peak)

    monkeypatch.setattr(command, "probe", measured)
    after = plan_job(job, probing=True)
    assert not after.fits and after.memory.overhead > before.memory.overhead
    changes = [change for change in after.ladder if change.settings is not None]
    assert changes and all(change.memory > before.memory.total for change in changes)
    assert any(change.fits for change in changes) and "train.micro_tokens" in (changes[0].settings or {})
