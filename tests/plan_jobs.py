"""Jobs on the config.json of tiny models, for tests of plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tiny_models import FAMILIES
from tunery.job import Job, load_job
from tunery.plan.shadow import Stream

LENGTHS = (40, 24, 56, 9)


def job_of(folder: Path, family: str = "llama", **sections: Any) -> Job:
    """A job on the config.json of a tiny model of several layers, without weights."""
    name, options = FAMILIES[family]
    layers = {"n_layer" if "n_layer" in options else "num_hidden_layers": 5}
    getattr(transformers, name)(**{**options, **layers}).save_pretrained(folder)
    return load_job(
        {
            "model": {"name": str(folder), "random_init": True},
            "data": {"train": "rows.jsonl"},
            "train": {"checkpointing": "none"},
            **sections,
        }
    )


def stream() -> Stream:
    """Sequences of LENGTHS, every target trained."""
    return Stream(LENGTHS, sum(LENGTHS) - len(LENGTHS))
