"""Runs in processes of their own, as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_runs import tiny_job
from tunery.job import Job
from tunery.run_folder import write_config


def job_file(folder: Path, **changes: Any) -> Path:
    """A job written as a YAML file, as a user would have it."""
    job = tiny_job(folder, **changes)
    folder.joinpath("job").mkdir(exist_ok=True)
    write_config(job, folder / "job")
    return folder / "job" / "tunery.yaml"


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Python with these words behind it, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **options,
    )  # fmt: skip


def train(path: Path, *overrides: str) -> str:
    """A run to its end; returns what it said."""
    process = start("-m", "tunery", "train", path, *overrides)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def train_on_two_ranks(path: Path, *overrides: str) -> tuple[int, str]:
    """A run of two ranks on the CPU; returns its exit status and what it said."""
    return run_on_two_ranks("-m", "tunery", "train", path, *overrides)


def run_on_two_ranks(*words: object) -> tuple[int, str]:
    """What torchrun makes of these words, on the CPU."""
    process = start(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29_400 + os.getpid() % 500, *words
    )  # fmt: skip
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def runs_on_two_ranks(folder: Path, *jobs: Job) -> tuple[int, str]:
    """The jobs one after the other, by two ranks that are started once: most of the time goes into starting. Returns
    their exit status and what they said."""
    files = [folder / f"two-ranks-{number}.json" for number in range(len(jobs))]
    for file, job in zip(files, jobs, strict=True):
        file.write_text(json.dumps(job.model_dump(mode="json")), encoding="utf-8")
    return run_on_two_ranks(Path(__file__).with_name("rank_runs.py"), *files)
