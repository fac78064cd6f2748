"""Tunery, by its public way: a job, `run_job`, and the run folder's steps.jsonl, whose `seconds` go from the end of one
optimizer step to the end of the next as StepClock's do."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.jobs import data_section
from bench.rivals.recorder import arguments, finish
from tunery.job import load_job
from tunery.loop import run_job

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def values(spec: dict[str, Any], output: str) -> dict[str, Any]:
    """The job as a user would write it."""
    job = spec["job"]
    model = {"name": spec["model"], "dtype": DTYPES[spec["settings"]["precision"]]}
    if not job["full"]:
        model["init_from"] = spec["adapter"]
    return {
        "model": model,
        "data": data_section(spec["rows_file"], job["max_length"]),
        "adapter": "full" if job["full"] else {"kind": "lora", **spec["lora"]},
        "optimizer": {"lr": job["lr"]},
        "schedule": {"kind": "constant", "warmup": 0},
        "train": {
            "epochs": 1, "max_steps": spec["steps"], "batch_size": job["batch_size"], "shuffle": False,
            "log_every": 1, "save_every": 10**6, "keep": 1, "resume": False,
        },
        "output": output,
        **spec.get("sections", {}),
    }  # fmt: skip


def main() -> None:
    spec, out = arguments()
    overrides = spec["settings"].get("overrides", [])
    with tempfile.TemporaryDirectory() as folder:
        run_job(load_job(values(spec, f"{folder}/run"), overrides))
        lines = [json.loads(line) for line in Path(folder, "run", "steps.jsonl").read_text().splitlines()]
    steps = [{key: line[key] for key in ("loss", "seconds", "tokens")} for line in lines if "loss" in line]
    finish(out, steps, {"precision": spec["settings"]["precision"], "overrides": overrides})


if __name__ == "__main__":
    main()
