"""Oracles: what a larger memory must allow and a smaller must not, and the real run's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from dataclasses import replace

import pytest
import torch

from plan_jobs import job_of
from tiny_runs import tiny_job
from tunery.api import train
from tunery.config_file import read_config
from tunery.devices import GIB, Device, Rates
from tunery.plan import choose as choosing
from tunery.plan.bill import Measured, corrected, make_plan
from tunery.plan.choose import best, choose, largest, least, rungs_of
from tunery.plan.ladder import ladder
from tunery.plan.planner import Planner, most_tokens
from tunery.plan.work import AssumedRows

RATES = Rates(1e12, 1e11, 1e11, 1e10, 1e-6, 0.0, overlaps=True)
GPU = Device("a card", "cuda", 80 * GIB, 2**20, 0.04, True, RATES)
LENGTH = 256


@pytest.fixture(scope="module")
def planner(tmp_path_factory) -> Callable[..., Planner]:
    """Makes planners of a tiny Llama on rows of 256 tokens, 64 a step; `memory` as a share of what it takes at its
    best. They share what was run on shapes, which depends neither on the memory nor on the rung that a job asks for."""
    folder, rows = tmp_path_factory.mktemp("model"), AssumedRows(64, LENGTH)
    known: dict[tuple[str, int | None], Planner] = {}

    def make(
        memory: float | None = None, adapter: str = "lora", checkpointing: str = "auto", micro_tokens: int | None = None
    ) -> Planner:
        train = {"batch_size": 64, "checkpointing": checkpointing, "micro_tokens": micro_tokens}
        job = job_of(folder, "llama", adapter=adapter, train=train, data={"max_length": LENGTH})
        if (adapter, micro_tokens) not in known:
            known[adapter, micro_tokens] = Planner(job, rows, GPU)
        made = copy(known[adapter, micro_tokens])
        made.job = job
        if memory is not None:
            wanted = made.memory(made.most, rungs_of(job, GPU)[0]).total
            made.device = replace(GPU, memory=int(memory * wanted))
        return made

    return make


def test_a_job_that_fits_takes_the_most(planner):
    made = planner()
    assert best(made, rungs_of(made.job, GPU)) == (16384, "none")
    assert ladder_of(made) == []


def ladder_of(made: Planner):
    return make_plan(made).ladder


def test_less_memory_gives_smaller_micro_batches(planner):
    sizes = []
    for share in (1.0, 0.7, 0.4, 0.15):
        made = planner(share)
        tokens, rung = best(made, rungs_of(made.job, made.device))
        assert made.memory(tokens, rung).total <= made.device.memory
        sizes.append(tokens)
        assert rung == "none"  # operations are launched at once here; else see test_planner.py
    assert sizes[0] == 16384 and sizes == sorted(set(sizes), reverse=True)


def test_the_largest_is_the_largest(planner):
    made = planner(0.6, checkpointing="none")
    tokens = largest(made, "none")
    assert tokens is not None
    assert made.memory(tokens, "none").total <= made.device.memory
    assert made.memory(tokens * 17 // 16, "none").total > made.device.memory


def test_where_nothing_fits_the_nearest_is_taken_and_the_ladder_says_so(planner):
    made = planner(0.001)
    assert best(made, rungs_of(made.job, made.device)) == (LENGTH, "offload")
    plan = make_plan(made)
    assert not plan.fits and plan.ladder and not any(change.fits for change in plan.ladder)
    assert {"train.micro_tokens", "train.checkpointing"} == {k for c in plan.ladder for k in c.settings or {}}


def test_what_the_job_fixes_stays(planner):
    made = planner(0.5, checkpointing="full", micro_tokens=8192)
    assert rungs_of(made.job, GPU) == ("full",) and least(made) == 8192
    assert best(made, ("full",)) == (8192, "full")
    assert choose(made.job, made.rows, made.device) == (8192, "full")


def test_the_ladder_goes_down_in_memory_and_up_in_time(planner):
    made = planner(0.3, adapter="full", checkpointing="none")
    changes = ladder(made)
    rungs = [c for c in changes if c.settings and "adapter" not in c.settings]
    assert [(c.settings or {}).get("train.checkpointing", "none") for c in rungs] == [
        "none",
        "selective",
        "full",
        "offload",
    ]
    at_least = [made.memory(least(made), r).total for r in ("none", "selective", "full", "offload")]
    assert at_least == sorted(at_least, reverse=True)
    times = [c.slower or 0.0 for c in rungs]
    assert times[2] > times[0] > 0.9
    lora = next(c for c in changes if c.settings and "adapter" in c.settings)
    assert lora.fits and lora.what.startswith("adapter=lora")


@pytest.mark.parametrize(("adapter", "word"), [("lora", "QLoRA"), ("full", "8-bit")])
def test_what_is_not_there_yet_cannot_be_set_and_comes_last(planner, adapter, word):
    changes = ladder(planner(0.001, adapter=adapter, checkpointing="none"))
    first = sum(c.settings is not None for c in changes)
    later = changes[first:]
    assert first and all(c.settings is None for c in later)
    assert any(word in c.what for c in later) and any("FSDP" in c.what for c in later)


def test_a_small_model_is_seen_to_fit_at_a_glance(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "Planner", lambda *a: pytest.fail("nothing had to be run"))
    job = job_of(tmp_path, train={"checkpointing": "auto"})
    cpu = Device("here", "cpu", 16 * GIB, GIB, 0.04, True, RATES)
    assert choose(job, AssumedRows(4, 64), cpu) == (2048, "none")
    assert choose(job, AssumedRows(4, 64), GPU) == (16384, "none")


def test_the_glance_is_above_what_is_needed(planner):
    made = planner()
    assert choosing.roughly(made.job, made.most, GPU) > made.memory(made.most, "none").total


def test_planning_is_a_function_of_its_arguments(planner):
    """Whatever else a planner was asked before."""
    used = planner(0.5, checkpointing="selective")
    fresh = Planner(used.job, used.rows, used.device)
    assert make_plan(fresh).to_dict() == make_plan(used).to_dict()


def test_a_run_keeps_to_what_it_began_with(tmp_path, monkeypatch):
    """Another memory at its resume changes nothing; a run from the beginning is planned anew."""
    job = tiny_job(tmp_path, train={"max_steps": 1})
    monkeypatch.setattr("tunery.resolve.choose", lambda *a: (96, "full"))
    train(job)
    monkeypatch.setattr("tunery.resolve.choose", lambda *a: (1024, "none"))
    saved = read_config(tmp_path / "run" / "tunery.yaml")["train"]
    assert (saved["micro_tokens"], saved["checkpointing"]) == (96, "full")
    (tmp_path / "run" / "all_results.json").unlink()  # as if it had been killed before its end
    train(job)
    saved = read_config(tmp_path / "run" / "tunery.yaml")["train"]
    assert (saved["micro_tokens"], saved["checkpointing"]) == (96, "full")
    train(job, "train.resume=false")
    saved = read_config(tmp_path / "run" / "tunery.yaml")["train"]
    assert (saved["micro_tokens"], saved["checkpointing"]) == (1024, "none")


def test_real_steps_correct_times_and_overhead(planner):
    made = planner(checkpointing="none")
    plan = make_plan(made)
    expected = made.step_seconds([LENGTH], "none")
    tensors = plan.memory.weights + plan.memory.optimizer + made.line("none").memory(LENGTH)
    measured = Measured([[LENGTH]] * 3, [99.0, 3 * expected, 3 * expected], tensors + 12345)
    after = corrected(plan, made, measured)
    assert after.seconds_per_step == pytest.approx(3 * plan.seconds_per_step)
    assert after.tokens_per_second == pytest.approx(plan.tokens_per_second / 3)
    assert after.memory.overhead == 12345 and after.memory.weights == plan.memory.weights
    assert "3.00" in after.notes[-1]
    assert (plan.times, after.times) == ("estimate", "corrected")


def test_float16_hardware_computes_in_float32(tmp_path):
    job = job_of(tmp_path)
    old = replace(GPU, bfloat16=False)
    assert Planner(job, AssumedRows(4, 64), old).dtype == torch.float32
    assert Planner(job, AssumedRows(4, 64), GPU).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hidden", "family", "adapter", "longest", "most"),
    [(64, "llama", "lora", 64, 2048), (512, "llama", "lora", 64, 2048), (1024, "llama", "lora", 64, 512),
     (4096, "llama", "lora", 64, 512), (4096, "llama", "lora", 700, 700), (4096, "llama", "full", 64, 2048),
     (4096, "mixtral", "lora", 64, 2048), (4096, "qwen2_moe", "lora", 64, 2048)],
)  # fmt: skip
def test_large_frozen_layers_keep_a_cpu_busy_with_fewer_tokens(tmp_path, hidden, family, adapter, longest, most):
    """But experts share the tokens of a micro-batch."""
    job = job_of(tmp_path, family, adapter=adapter)
    path = tmp_path / "config.json"
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden if hidden > 512 else hidden}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    cpu = Device("here", "cpu", 16 * GIB, GIB, 0.04, True, RATES)
    assert most_tokens(job, AssumedRows(4, longest), cpu) == most
    assert most_tokens(job, AssumedRows(4, longest), GPU) == 16384
