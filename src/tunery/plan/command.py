"""`tunery plan`: the plan of a job file, with its data where they can be read."""

from __future__ import annotations

import os
from typing import Any

from tunery.data.sources import locate
from tunery.data.stream import StreamingExamples
from tunery.devices import known_device, this_device
from tunery.errors import ConfigError, DataError, ModelError
from tunery.job import Job
from tunery.models.load import load_config
from tunery.plan.bill import Plan, corrected, make_plan
from tunery.plan.planner import Planner
from tunery.plan.work import AssumedRows
from tunery.probe import probe
from tunery.setup import Read, read_data


def plan_job(job: Job, device: str | None = None, probing: bool = False, console: Any = None) -> Plan:
    """The plan of `job` on this machine, or on a `device` by name; with `probing`, corrected by three real steps here.
    Rows that are not there, or come as a stream, are assumed to be as long as they may be, and the plan says so. Raises
    ConfigError for an unknown device, ModelError for a model that cannot be, and DataError for rows that are there and
    cannot be used."""
    load_config(job.model)
    if probing and device:
        raise ConfigError("--probe: runs on this machine; leave out --device")
    found = known_device(device) if device else this_device()
    read, note = read_rows(job, console)
    if probing and read is None:
        raise ConfigError(f"--probe: needs the rows ({note})")
    rows = AssumedRows(job.train.batch_size, job.data.max_length) if read is None else read.data.train
    assert not isinstance(rows, StreamingExamples)
    planner = Planner(job, rows, found, int(os.environ.get("WORLD_SIZE", "1")))
    plan = make_plan(planner)
    if note:
        plan.notes.insert(0, note)
    if probing and read is not None:
        plan = corrected(plan, planner, probe(job, read, plan.micro_tokens, plan.checkpointing))
    return plan


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
    try:
        return read_data(job, console), None
    except DataError as error:
        if any(source.hub for source in located):
            return None, str(error)
        raise
    except ModelError as error:  # a config.json without a tokenizer beside it
        return None, str(error)
