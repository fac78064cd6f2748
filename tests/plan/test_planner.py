"""Oracles: sizes and times worked by hand, and the config.json of families whose code does not run on shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig

from plan_jobs import job_of
from tunery import memory
from tunery.devices import Device, Rates, known_device, this_device
from tunery.job import Job, load_job
from tunery.memory import Profile, Span
from tunery.plan.bill import make_plan
from tunery.plan.planner import Planner
from tunery.plan.shadow import Stream
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


def hand_made(products: int, overlaps: bool) -> tuple[Planner, Profile]:
    """A planner that only has rates, and 10 operations of 2 seconds each with so many different products."""
    span = Span("embed", 0, 0, 0, work=Counter({(True, 200, 0): 10}), products=set(range(products)))
    planner = Planner.__new__(Planner)
    planner.device = Device("x", "cuda", 0, 0, 0.0, True, Rates(100.0, 10.0, 5.0, 1.0, 0.5, 7.0, overlaps))
    return planner, Profile({"embed": span}, [], [], 0, accumulates=False)


def test_every_operation_and_every_new_product_takes_its_time():
    for products, overlaps, seconds in ((0, False, 20 + 5), (3, False, 20 + 5 + 21), (0, True, 20), (3, True, 26)):
        planner, profile = hand_made(products, overlaps)
        assert planner._busy(profile) == seconds


def test_blocks_of_attention_are_operations_too(tmp_path):
    """Many short sequences take more of them than one long one; both have the same tokens."""
    job = job_of(tmp_path, adapter="full")  # heads of 8 numbers, which the compiled form does not take
    planner = Planner(job, AssumedRows(4, 64), this_device("cpu"))
    count = lambda *lengths: sum(planner.profile(Stream(lengths, 60), "none", False).work().values())  # noqa: E731
    assert count(*[4] * 16) - count(64) == 15 * 5 * 28  # blocks more, layers, operations of both passes
