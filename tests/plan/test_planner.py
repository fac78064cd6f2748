"""Oracles: sizes and times worked by hand, and the config.json of families whose code does not run on shapes."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from transformers import AutoConfig

from plan_jobs import job_of
from tunery import memory
from tunery.devices import Device, Rates, known_device, this_device
from tunery.job import Job, load_job
from tunery.memory import Profile, Span
from tunery.models.rungs import RUNGS
from tunery.plan.bill import make_plan
from tunery.plan.choose import best, largest
from tunery.plan.planner import Line, Planner
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
        assert planner._busy(profile, Stream((1,), 1), "none") == seconds


def test_blocks_of_attention_are_operations_too(tmp_path):
    """Many short sequences take more of them than one long one; both have the same tokens."""
    job = job_of(tmp_path, adapter="full")  # heads of 8 numbers, which the compiled form does not take
    planner = Planner(job, AssumedRows(4, 64), this_device("cpu"))
    count = lambda *lengths: sum(planner.profile(Stream(lengths, 60), "none", False).work().values())  # noqa: E731
    assert count(*[4] * 16) - count(64) == 15 * 5 * 28  # blocks more, layers, operations of both passes


def test_a_line_goes_through_its_points_and_never_below_the_launch():
    line = Line((10, 100, 200), (0, 900, 1900), (1.0, 2.0, 12.0), least=0.95)
    assert [line.memory(tokens) for tokens in (10, 55, 100, 150, 300)] == [0, 450, 900, 1400, 2900]
    assert [line.seconds(tokens) for tokens in (10, 55, 150, 300)] == [1.0, 1.5, 7.0, 22.0]
    assert line.seconds(1) == 0.95


def offloading_card(job: Job, host: float) -> Planner:
    """On a card that copies `host` bytes a second."""
    rates = Rates(1e12, 1e11, 1e11, host, 0.0, 0.0, overlaps=True)
    return Planner(job, AssumedRows(64, 256), Device("card", "cuda", 2**40, 2**20, 0.04, True, rates))


def test_offloading_takes_the_time_of_its_copies(tmp_path):
    stream, copied = Stream((256,) * 64, 16000), 5 * 64 * 256 * 32 * 4  # layers, tokens, numbers, float32
    seconds = {}
    for host in (1e15, 1e3):
        planner = offloading_card(job_of(tmp_path, adapter="full"), host)
        profile = planner.profile(stream, "offload", False)
        seconds[host] = planner._busy(profile, stream, "offload")
        full = planner._busy(profile, stream, "full")
        assert full == pytest.approx(seconds[1e15])  # where copies are nothing beside it
    assert seconds[1e3] == pytest.approx(2 * copied / 1e3)  # both ways, one after the other


def test_layers_without_a_backward_are_not_offloaded(tmp_path):
    planner = offloading_card(job_of(tmp_path, adapter={"kind": "freeze", "layers": 2}), 1e3)
    assert planner.shadow.below == 3
    stream = Stream((256,) * 64, 16000)
    assert planner._busy(planner.profile(stream, "offload", False), stream, "offload") == pytest.approx(
        2 * 2 * 64 * 256 * 32 * 2 / 1e3
    )


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> Planner:
    job = job_of(
        tmp_path_factory.mktemp("roomy"), train={"batch_size": 64, "checkpointing": "auto"}, data={"max_length": 256}
    )
    return offloading_card(job, 1e11)


def on(planner: Planner, tokens: int, launch: float, host: float) -> Planner:
    """The same with other rates, and with memory for micro-batches of so many tokens; nothing is run again."""
    other = copy(planner)
    rates = replace(planner.device.rates, launch=launch, host=host)
    other.device = replace(planner.device, table=rates, memory=planner.memory(tokens, "none").total)
    other.line = lru_cache(maxsize=None)(other._line)
    return other


@pytest.mark.parametrize("host", [1e8, 1e11])
@pytest.mark.parametrize("launch", [1e-7, 1e-3])
@pytest.mark.parametrize("tokens", [8192, 2048, 512])
def test_the_fastest_that_fits_is_taken(roomy, tokens, launch, host):
    """Whatever a card is slow at: no rung of the ladder that fits is faster by more than a little."""
    planner = on(roomy, tokens, launch, host)
    size, rung = best(planner, RUNGS)
    assert planner.memory(size, rung).total <= planner.device.memory
    fitting = [(largest(planner, r), r) for r in RUNGS]
    assert planner.seconds(size, rung) <= 1.05 * min(planner.seconds(n, r) for n, r in fitting if n is not None)


def test_recomputing_is_taken_where_small_micro_batches_are_slower(roomy):
    quick, slow = (best(on(roomy, 1024, launch, 1e11), RUNGS) for launch in (1e-7, 1e-3))
    assert quick[1] == "none" and slow[1] != "none" and slow[0] > quick[0]
