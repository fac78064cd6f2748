"""`tunery plan`: the plan of a job file, with its data where they can be read."""

from __future__ import annotations

import os
from typing import Any

from tunery.data.sources import locate
from tunery.data.store import TokenStore
from tunery.devices import known_device, this_device
from tunery.errors import ConfigError, DataError, ModelError
from tunery.job import Job
from tunery.models.load import load_config
from tunery.plan.bill import Plan, make_plan
from tunery.plan.work import AssumedRows, Rows
from tunery.setup import read_data


def plan_job(job: Job, device: str | None = None, console: Any = None) -> Plan:
    """The plan of `job` on this machine, or on a `device` by name. Rows that are not there, or come as a stream, are
    assumed to be as long as they may be, and the plan says so. Raises ConfigError for an unknown device, ModelError
    for a model that cannot be, and DataError for rows that are there and cannot be used."""
    load_config(job.model)
    found = known_device(device) if device else this_device()
    rows, note = rows_of(job, console)
    plan = make_plan(job, rows, found, int(os.environ.get("WORLD_SIZE", "1")))
    if note:
        plan.notes.insert(0, note)
    return plan


def rows_of(job: Job, console: Any = None) -> tuple[Rows, str | None]:
    """The tokenised rows, or assumed ones and why."""
    assumed = AssumedRows(job.train.batch_size, job.data.max_length)
    if not job.data.train:
        return assumed, "data.train: no data given"
    if job.data.streaming:
        return assumed, "data.streaming: rows are read while training"
    try:
        located = [locate(s, f"data.train[{i}]", job.data.dataset_dir) for i, s in enumerate(job.data.train)]
    except (ConfigError, DataError) as error:
        return assumed, str(error)
    try:
        data = read_data(job, console).data.train
    except DataError as error:
        if any(source.hub for source in located):
            return assumed, str(error)
        raise
    except ModelError as error:  # a config.json without a tokenizer beside it
        return assumed, str(error)
    assert isinstance(data, TokenStore)
    return data, None
