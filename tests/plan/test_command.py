"""Oracle: what a person at a terminal should see, and the run that follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plan_jobs import job_of
from test_cli import tunery
from tiny_runs import tiny_job
from tunery.api import train
from tunery.devices import known_device
from tunery.errors import ConfigError, ModelError
from tunery.plan import command
from tunery.plan.command import plan_job
from tunery.probe import probe
from tunery.read import read_data
from tunery.run_folder import write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    job = tiny_job(path, model={"dtype": "float32"}, train={"micro_tokens": 256, "checkpointing": "none"})
    write_config(job, path)
    return path


def test_the_command_prints_a_plan_and_writes_nothing(folder):
    done = tunery("plan", folder / "tunery.yaml", "--device", "h200")
    assert done.returncode == 0, done.stderr
    assert "h200" in done.stdout and "fits" in done.stdout and "6 steps" in done.stdout
    assert not (folder / "run").exists()


def test_json_is_one_object(folder):
    values = json.loads(tunery("plan", folder / "tunery.yaml", "--device", "t4", "--json").stdout)
    assert values["device"] == "t4" and values["dtype"] == "float32" and values["steps"] == 6
    assert values["memory"]["total"] == sum(v for k, v in values["memory"].items() if k != "total")


def test_the_plan_is_of_the_run(folder):
    """Steps and tokens of the plan are those of the run that follows."""
    job = tiny_job(folder, model={"dtype": "float32"}, train={"micro_tokens": 256}, output=str(folder / "real"))
    plan = plan_job(job, "cpu")
    result = train(job)
    assert plan.steps == result.step
    data = read_data(job).data.train
    assert plan.tokens == 2 * int(data.lengths.sum())  # type: ignore[union-attr]


def test_real_steps_are_close_to_the_plan(folder):
    job = tiny_job(folder, model={"dtype": "float32"}, train={"micro_tokens": 256})
    read = read_data(job)
    measured = probe(job, read, 256, "none")
    assert len(measured.seconds) == len(measured.streams) == 3 and min(measured.seconds) > 0
    assert sum(sum(streams) for streams in measured.streams) <= read.data.train.lengths.sum()  # type: ignore[union-attr]
    assert measured.peak > 10**8
    plan = plan_job(job, probing=True)
    assert "corrected by 3 real steps" in plan.notes[-1]
    assert not (folder / "run").exists()


def test_config_json_alone_is_enough(tmp_path):
    """No weights, no tokenizer, no rows: each is said."""
    job = job_of(tmp_path, data={"train": str(tmp_path / "missing.jsonl"), "max_length": 64})
    plan = plan_job(job, "4090")
    assert plan.parameters > 1000 and plan.steps is None
    assert "missing.jsonl" in plan.notes[0] and "64 tokens" in plan.notes[1]


def test_a_stream_is_assumed(folder):
    job = tiny_job(folder, data={"streaming": True, "eval": None}, train={"max_steps": 4})
    plan = plan_job(job, "cpu")
    assert plan.steps == 4 and "streaming" in plan.notes[0]


def test_wrong_input_is_one_clear_error(folder):
    with pytest.raises(ModelError, match="no such folder"):
        plan_job(tiny_job(folder, model={"name": str(folder / "modle")}))
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        plan_job(tiny_job(folder), "h2000")
    with pytest.raises(ConfigError, match="--device: is empty"):
        plan_job(tiny_job(folder), "")
    with pytest.raises(ConfigError, match="leave out --device"):
        plan_job(tiny_job(folder), "h200", probing=True)
    with pytest.raises(ConfigError, match="needs the rows"):
        plan_job(tiny_job(folder, data={"train": str(folder / "none.jsonl")}), probing=True)
    done = tunery("plan", folder / "tunery.yaml", "adapter=lora", "adapter.targets=[q_porj]", "--device", "t4")
    assert done.returncode and "q_porj" in done.stderr and "Traceback" not in done.stderr


def test_ranks_are_counted_and_what_is_assumed_of_them_is_said(folder, monkeypatch):
    job = tiny_job(folder, model={"dtype": "float32"}, train={"micro_tokens": 256})
    monkeypatch.setattr(command, "known_device", lambda name: here if name == "cpu" else known_device(name))
    here = known_device("cpu")
    alone = plan_job(job, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = plan_job(job, "cpu")
    assert (shared.ranks, shared.device_memory) == (2, alone.device_memory // 2)
    assert "2 processes on this machine, each with 1/2 of its memory" in shared.notes[0]
    assert "2 devices of this kind" in plan_job(job, "4090").notes[0]
    assert not any("WORLD_SIZE" in note for note in alone.notes)
    with pytest.raises(ConfigError, match="--probe: runs in one process"):
        plan_job(job, probing=True)


@pytest.mark.parametrize("said", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_is_a_number(folder, monkeypatch, said):
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE: '{said}' is no number of processes"):
        plan_job(tiny_job(folder), "cpu")
