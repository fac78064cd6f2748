"""`tunery plan`: the plan of a job file, with its data where they can be read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunery.data.sources import locate
from tunery.devices import known_device, this_device
from tunery.errors import ConfigError, DataError, ModelError, OutOfMemoryError
from tunery.job import Job
from tunery.models.load import ModelConfig, load_config, resolve_name
from tunery.plan.bill import Plan, corrected, make_plan, out_of_memory
from tunery.plan.planner import Planner
from tunery.probe import probe
from tunery.read import Read, check_job, read_data
from tunery.resolve import for_training, planned


def plan_job(job: Job, device: str | None = None, probing: bool = False, console: Any = None) -> Plan:
    """The plan of `job` on this machine, or on a `device` by name; with `probing`, corrected by three real steps here.
    Rows that are not there, or come as a stream, are assumed to be as long as they may be, and the plan says so. Raises
    ConfigError for an unknown device, ModelError for a model that cannot be, and DataError for rows that are there and
    cannot be used."""
    load_config(job.model)
    if job.data.streaming:  # rows that are read are checked with the job
        check_job(job)
    world = _world()
    if probing and device is not None:
        raise ConfigError("--probe: runs on this machine; leave out --device")
    if probing and world > 1:
        raise ConfigError(f"--probe: runs in one process; WORLD_SIZE is {world}, unset it")
    found = known_device(device) if device is not None else this_device()
    if probing and job.rollout.generator == "vllm":
        raise ConfigError("--probe: cannot tell vLLM's memory from training's; leave it out")
    read, note = read_rows(job, console)
    if probing and read is None:
        raise ConfigError(f"--probe: needs the rows ({note})")
    asked, rows = planned(job, read)
    whole, found = found.memory, for_training(found, job)
    if found.kind == "cpu":
        whole, found = whole // world, replace(found, memory=found.memory // world)
    planner = Planner(asked, rows, found, world)
    plan = make_plan(planner)
    if world > 1:
        plan.notes.insert(0, _ranks(world, found.kind))
    if note:
        plan.notes.insert(0, note)
    if read is not None and read.rewards is not None:
        read.rewards.close()
        plan.notes.insert(0, "answers are taken to be as long as they may be; the time to generate them comes on top")
    if found.memory < whole:
        share = f"{job.rollout.vllm_memory:.0%} of the device's memory"
        plan.notes.insert(0, f"{share} is vLLM's (rollout.vllm_memory) and not in what this has")
    if probing and read is not None:
        try:
            plan = corrected(plan, planner, probe(job, read, plan.micro_tokens, plan.checkpointing))
        except OutOfMemoryError as error:
            plan = out_of_memory(plan, planner, str(error))
    return plan


def _world() -> int:
    """Ranks, as torchrun counts them."""
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(f"WORLD_SIZE: {said!r} is no number of processes; unset it for one, or set it to 2, say")
    return int(said)


def _ranks(world: int, kind: str) -> str:
    """What is assumed of them."""
    if kind == "cpu":
        share = f"on this machine, each with 1/{world} of its memory and as fast as one alone"
        return f"WORLD_SIZE={world}: {world} processes {share}; set OMP_NUM_THREADS to the threads each will have"
    return f"WORLD_SIZE={world}: {world} devices of this kind, one a rank; the exchange of gradients takes no time here"


def read_rows(job: Job, console: Any = None) -> tuple[Read | None, str | None]:
    """The tokenised rows, or None and why there are none."""
    if not job.data.train:
        return None, "data.train: no data given"
    if job.data.streaming:
        return None, "data.streaming: rows are read while training"
    try:
        located = [locate(s, f"data.train[{i}]", job.data.dataset_dir) for i, s in enumerate(job.data.train)]
    except (ConfigError, DataError) as error:
        return None, str(error)
    if _only_config(job.model):
        return None, f"{job.model.name}: no tokenizer beside its config.json"
    try:
        return read_data(job, console), None
    except DataError as error:
        if any(source.hub for source in located):
            return None, str(error)
        raise
    except ModelError as error:  # of the model there is only a config.json
        return None, str(error)


def _only_config(model: ModelConfig) -> bool:
    """Whether all there is of a model is its config.json: shapes enough for a plan, and nothing to read rows with."""
    folder = Path(resolve_name(model.name))
    return folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*"))
