"""Oracle: the plan's own numbers, and sizes and times written by hand."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from tunery.plan.bill import Plan
from tunery.plan.ladder import Change
from tunery.plan.planner import Memory
from tunery.plan.show import bar, bar_parts, duration, print_plan, size

GB = 10**9


def plan(memory: int = 40 * GB, **changes) -> Plan:
    values = {
        "model": "a-model", "adapter": "lora", "device": "a100-40g", "device_memory": memory, "ranks": 1,
        "dtype": "bfloat16", "parameters": 8_000_000_000, "trainable": 20_000_000, "micro_tokens": 4096,
        "checkpointing": "none", "memory": Memory(16 * GB, GB, 0, 10 * GB, 2 * GB, 0, GB), "fits": memory > 30 * GB,
        "flops_per_token": 33e9, "executed_flops_per_token": 34e9, "tokens_per_second": 4000.0,
        "seconds_per_step": 10.0, "steps": 100, "tokens": 4_000_000, "seconds": 1000.0, "disk": 2 * GB,
    }  # fmt: skip
    return Plan(**{**values, **changes})


def printed(shown: Plan) -> str:
    text = StringIO()
    print_plan(shown, Console(file=text, width=110))
    return text.getvalue()


def test_the_bar_is_the_devices_memory():
    parts = bar_parts(plan())
    assert [p.name for p in parts][-1] == "free" and sum(p.share for p in parts) == pytest.approx(1)
    assert {p.name: p.bytes for p in parts}["free"] == 10 * GB
    text = bar(plan(), width=40).plain
    assert len(text) == 40 and text.count("·") == 10


def test_the_bar_of_what_does_not_fit_is_longer_than_the_device():
    parts = bar_parts(plan(20 * GB))
    assert "free" not in [p.name for p in parts] and sum(p.share for p in parts) == pytest.approx(1.5)
    assert len(bar(plan(20 * GB), width=40).plain) == 60


def test_a_person_reads_the_numbers():
    text = printed(plan())
    for words in ("8,000,000,000 parameters", "20,000,000 (0.25%, lora)", "30 GB: fits", "4,000 tokens/s", "17 min"):
        assert words in text, words
    assert "activations  10 GB" in text and "gradients" not in text  # parts of nothing are left out
    assert "change" not in text


def test_what_the_times_are_is_said():
    assert "an estimate" in printed(plan()) and plan().to_dict()["times"] == "estimate"
    after = plan(times="corrected")
    assert "an estimate" not in printed(after) and "by real steps" in printed(after)


def test_the_ladder_is_printed_with_what_cannot_be_set_yet():
    changes = [
        Change("train.checkpointing=full", 18 * GB, True, 4096, 1.4, {"train.checkpointing": "full"}),
        Change("frozen weights in 4 bits (QLoRA)", 12 * GB, True, 4096, 1.6, None),
    ]
    text = printed(plan(20 * GB, ladder=changes, notes=["rows are assumed"]))
    assert "does not fit" in text and "x 1.40" in text and "note: rows are assumed" in text
    first, second = (next(line for line in text.splitlines() if name in line) for name in ("=full", "QLoRA"))
    assert "not yet" not in first and "not yet in this version" in second


def test_a_plan_of_unknown_length_says_no_end():
    assert "steps" not in printed(plan(steps=None, tokens=None, seconds=None))


@pytest.mark.parametrize(
    ("bytes", "words"),
    [(512, "1 kB"), (96_100_000, "96.1 MB"), (143 * GB, "143 GB"), (1_500_000_000_000, "1.5 TB"), (16 * GB, "16 GB")],
)
def test_sizes(bytes, words):
    assert size(bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0482, "0.048 s"), (75, "75 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_same_numbers_as_json():
    values = plan().to_dict()
    assert values["memory"]["total"] == 30 * GB and values["fits"] is True and values["ladder"] == []
