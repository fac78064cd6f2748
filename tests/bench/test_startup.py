"""The start-up benchmark. Oracles: tables and import times worked by hand, and processes that are known to be slow."""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path

import pytest

from bench import startup

TRACE = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch.nn
import time:       250 |        350 | torch
some other line
import time:        40 |         40 | json
"""


def test_import_times_are_summed_by_package():
    assert startup.import_seconds(TRACE) == {"torch": 350e-6, "json": 40e-6}


def test_a_phase_is_without_the_phases_inside_it():
    module = types.SimpleNamespace(inner=lambda: time.sleep(0.05), outer=None)
    module.outer = lambda: (time.sleep(0.02), module.inner(), module.inner())
    watch = startup.Phases()
    watch.watch("inner", module, "inner")
    watch.watch("outer", module, "outer")
    module.outer()
    assert watch.seconds["inner"] >= 0.1
    assert 0.02 <= watch.seconds["outer"] < watch.seconds["inner"]
    with pytest.raises(AttributeError):
        watch.watch("gone", module, "gone")


def test_the_clock_stops_at_the_first_line(tmp_path):
    steps = tmp_path / "steps.jsonl"
    code = f"import pathlib, time; time.sleep(0.3); pathlib.Path({str(steps)!r}).write_text('x'); time.sleep(60)"
    seconds = startup.until_first_step([sys.executable, "-c", code], steps, dict(os.environ))
    assert 0.3 <= seconds < 30


def test_what_ends_early_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended before its first step: gone wrong"):
        startup.until_first_step([sys.executable, "-c", "print('gone wrong')"], tmp_path / "none", dict(os.environ))


def test_dropped_files_are_as_they_were(tmp_path):
    (tmp_path / "file").write_text("content")
    startup.drop([tmp_path])
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["Tunery", "Trainer"])
def test_a_start_of_each_contestant(who, tmp_path):
    assert 0 < startup.start(who, "builtin:tiny", tmp_path, lambda: None) < startup.LIMIT


@pytest.mark.slow
def test_the_parts_of_a_start(tmp_path):
    """Every part is found in the code, takes time, and together they are the whole."""
    result = startup.breakdown()
    phases = result["phases"]["warm"]
    assert list(phases) == [startup.IMPORTS, *startup.PHASES, startup.STEP, "everything else"]
    assert all(seconds > 0 for seconds in phases.values())
    assert phases["everything else"] < 0.2 * sum(phases.values())
    assert result["imports"]["torch"] > 0.05


def test_the_job_is_one_of_ours(tmp_path):
    from tunery.job import load_job

    job = load_job(startup.write_job(tmp_path, "builtin:tiny", tmp_path / "run"))
    assert job.model.name == "builtin:tiny" and Path(job.data.train[0].path).is_file()


def test_the_section():
    times = {"Tunery": [2.0, 3.0, 4.0], "Trainer": [6.0, 6.0, 6.0]}
    result = {
        "help": [0.3, 0.1, 0.2], "starts": {"tiny": {"cold": times}},
        "breakdown": {
            "phases": {"first": {"imports": 1.5, "rows": 2.5}, "warm": {"imports": 1.5, "rows": 0.5}},
            "imports": {"torch": 0.75},
        },
        "command": "c", "machine": "m", "versions": {}, "date": "d",
    }  # fmt: skip
    text = startup.section(json.loads(json.dumps(result)))
    assert "`tunery --help`: 0.20 s (median of 3)." in text
    assert "| the embedded model | cold | 3.00 s | 6.00 s | 2.00 (1.50 to 3.00) |" in text
    assert "| rows | 2.50 s | 0.50 s |" in text and "| all | 4.00 s | 2.00 s |" in text
    assert "torch 0.75 s." in text
