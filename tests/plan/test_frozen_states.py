"""Oracles: the run, which decides by the same rules and writes the file; and operations counted by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import tunery.loop
from tiny_runs import tiny_job
from tunery.api import train
from tunery.frozen import skipped_flops
from tunery.memory import Operation, Profile
from tunery.models.boundary import FILE
from tunery.plan.command import plan_job

FREEZE = {"kind": "freeze", "layers": 1}
REASONS = [
    ({"train": {"epochs": 1}}, "the run sees each row once"),
    ({"train": {"neftune": 5.0}}, "train.neftune adds new noise"),
    ({"adapter": {**FREEZE, "layers": -2, "extra": ["embed_tokens"]}}, "the first layer trains"),
]


def job_of(folder: Any, **changes: Any) -> Any:
    job = {"adapter": FREEZE, "model": {"dtype": "float32"}, "train": {"epochs": 4, "micro_tokens": 256}}
    changes = {key: {**job.get(key, {}), **value} for key, value in changes.items()}
    return tiny_job(folder, **{**job, **changes})


def test_the_plan_is_of_the_run(tmp_path, monkeypatch):
    job = job_of(tmp_path)
    plan = plan_job(job, "cpu")
    plain = plan_job(job_of(tmp_path, adapter={**FREEZE, "cache": False}), "cpu")
    found: dict[str, Any] = {}
    drop = tunery.loop.drop_frozen_states

    def at_the_end(run: Any) -> None:
        found.update(size=(run.output / FILE).stat().st_size, saved=skipped_flops(run))
        drop(run)

    monkeypatch.setattr(tunery.loop, "drop_frozen_states", at_the_end)
    result = train(job)
    assert plan.steps == result.step
    assert plan.disk - plain.disk == found["size"]
    assert plan.flops_per_token == pytest.approx(plain.flops_per_token * (1 - found["saved"]), rel=1e-6)
    assert plan.seconds is not None and plain.seconds is not None and plan.seconds < plain.seconds
    assert plan.executed_flops_per_token < plain.executed_flops_per_token
    assert any("the frozen layers run in the first epoch" in note for note in plan.notes)
    assert not any("frozen" in note for note in plain.notes)


@pytest.mark.parametrize(("changes", "why"), REASONS, ids=[why for _, why in REASONS])
def test_why_not_is_said_as_the_run_says_it(tmp_path, changes, why):
    job = job_of(tmp_path, **changes)
    (note,) = [note for note in plan_job(job, "cpu").notes if "frozen layers" in note]
    assert why in note
    train(job)
    assert note in (tmp_path / "run" / "report.md").read_text()


def test_a_full_disk_here_is_seen_and_that_of_another_machine_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tunery.plan.frozen_states.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    job = job_of(tmp_path)
    assert any("has 1.0kB free" in note for note in plan_job(job, "cpu").notes)
    assert any("run in the first epoch" in note for note in plan_job(job, "4090").notes)


def test_a_later_step_is_all_but_the_frozen_forwards(tmp_path):
    from plan_jobs import job_of as shapes_of
    from tunery.devices import Device, Rates
    from tunery.plan.planner import Planner
    from tunery.plan.shadow import Stream
    from tunery.plan.work import AssumedRows

    card = Device("card", "cuda", 2**40, 0, 0.0, True, Rates(1e12, 1e11, 1e11, 1e10, 0.0, 0.0, True))
    planner = Planner(shapes_of(tmp_path, adapter={**FREEZE, "layers": 2}), AssumedRows(4, 64), card)
    stream = Stream((64,) * 4, 200)
    profile: Profile = planner.profile(stream, "none", False)
    assert planner.shadow.below == 3
    frozen: Counter[Operation] = Counter()
    for kind in profile.layers[:3]:
        frozen.update(profile.spans["forward", kind].work)
    less = planner._busy(profile, stream, "none") - planner._busy(profile, stream, "none", reading=True)
    assert less == pytest.approx(planner._time(frozen)) and less > 0
