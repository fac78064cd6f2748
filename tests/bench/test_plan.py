"""Oracles: torch's own count of operations, and tables written by hand."""

from __future__ import annotations

import pytest
from bench.plan import FLOP_SHAPES, flop_table, job_tables, make_job, measure_flops, off

from tunery.job import load_job


@pytest.mark.parametrize("family", FLOP_SHAPES)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_operations_on_shapes_are_those_of_the_real_step(family, adapter):
    row = measure_flops(family, adapter)
    assert row["planned"] == row["counted"] > 1e9
    assert row["useful"] == pytest.approx(row["counted"], rel=0.1)


def test_the_tables_say_how_far_off():
    assert off(110.0, 100.0) == "+10.0%" and off(95.0, 100.0) == "-5.0%"
    (line,) = flop_table([{"family": "Llama", "adapter": "lora", "counted": 2e9, "planned": 1e9, "useful": 3e9}])[2:]
    assert line == "| Llama | lora | 2.00 G | 1.00 G | -50.0% | 3.00 G | +50.0% |"
    row = {
        "case": {"name": "LoRA"}, "allocated": 200e6, "planned": 220e6, "process": 1e9, "planned_process": 9e8,
        "seconds": 10.0, "planned_seconds": 11.0, "unprobed_seconds": 5.0,
    }  # fmt: skip
    memory, time = (line for line in job_tables([row]) if line.startswith("| LoRA"))
    assert memory == "| LoRA | 200 MB | 220 MB | +10.0% | 1000 MB | 900 MB | -10.0% |"
    assert time == "| LoRA | 10.00 | 11.00 | +10.0% | 5.00 | -50.0% |"


def test_the_jobs_can_be_run(tmp_path):
    from bench.plan import CASES

    for case in CASES:
        job = load_job(make_job(case, tmp_path, steps=2))
        rows = (tmp_path / f"rows-{case.words[0]}-{case.words[1]}-{case.batch_size}.jsonl").read_text().splitlines()
        assert len(rows) == 2 * case.batch_size == 2 * job.train.batch_size
