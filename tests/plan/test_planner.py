"""Oracles: sizes and times worked by hand, and the config.json of families whose code does not run on shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from tunery import memory
from tunery.devices import known_device
from tunery.job import Job, load_job
from tunery.plan.bill import make_plan
from tunery.plan.planner import Planner
from tunery.plan.work import AssumedRows

SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3}


def family_job(folder: Path, family: str) -> Job:
    AutoConfig.for_model(family, **SMALL).save_pretrained(folder)
    return load_job({"model": {"name": str(folder), "random_init": True}, "adapter": "full", "data": {"train": "x"}})


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_a_model_that_takes_a_token_at_a_time_is_planned_by_formula(tmp_path, monkeypatch, family):
    monkeypatch.setattr(memory, "MOST_OPERATIONS", 2000)
    plan = make_plan(Planner(family_job(tmp_path, family), AssumedRows(4, 512), known_device("4090")))
    assert plan.seconds_per_step > 0 and plan.flops_per_token > 0
    (note,) = [note for note in plan.notes if "by formula" in note]
    assert "one token after the other" in note and "slower" in note
