"""Runs in processes of their own, as a user would start them."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, text=True, **options)


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
    process = _torchrun(os.getpid() % 500, *words)
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def _torchrun(port: int, *words: object, **options: Any) -> subprocess.Popen[str]:
    return start(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29_400 + port, *words, **options
    )


class _Ranks:
    """Two ranks that wait for jobs (rank_runs.py) until this process ends: most of the time goes into starting them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tunery-ranks-"))
        self.asked = 0
        self.log = (self.folder / "log").open("w+", encoding="utf-8")
        script = Path(__file__).with_name("rank_runs.py")
        self.environment = dict(os.environ)
        words = (script, self.folder, os.getpid())
        self.process = _torchrun(500 + os.getpid() % 500, *words, stdout=self.log)
        atexit.register(self.stop)

    def run(self, jobs: Sequence[Path], timeout: float = 240) -> tuple[int, str]:
        """Exit status and what was said. After anything but 0 others are asked the next time."""
        begun = len((self.folder / "log").read_text(encoding="utf-8"))
        number, self.asked = self.asked, self.asked + 1
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        asked = {
            "jobs": [str(job) for job in jobs], "paths": paths, "folder": os.getcwd(),
            "environment": dict(os.environ.items() - self.environment.items()),
        }  # fmt: skip
        (self.folder / "next").write_text(json.dumps(asked), encoding="utf-8")
        (self.folder / "next").rename(self.folder / f"{number}.json")
        answers = [self.folder / f"{number}.{rank}" for rank in range(2)]
        until, failed = time.monotonic() + timeout, ""
        while not failed and not all(answer.exists() for answer in answers):
            if self.process.poll() is not None or time.monotonic() > until:
                failed = f"torchrun ended, or took more than {timeout} s"
            failed += "".join(answer.read_text(encoding="utf-8") for answer in answers if answer.exists())
            time.sleep(0.02)
        failed = failed or "".join(answer.read_text(encoding="utf-8") for answer in answers)
        said = (self.folder / "log").read_text(encoding="utf-8")[begun:]
        if failed:
            self.stop()
        return int(bool(failed)), said + failed

    def stop(self) -> None:
        """Without torchrun its ranks end themselves, whatever they do."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)
        waiting.clear()


waiting: list[_Ranks] = []


def runs_on_two_ranks(folder: Path, *jobs: Job) -> tuple[int, str]:
    """The jobs one after the other by two ranks on the CPU. Returns their exit status and what they said."""
    files = [folder / f"two-ranks-{number}.json" for number in range(len(jobs))]
    for file, job in zip(files, jobs, strict=True):
        file.write_text(json.dumps(job.model_dump(mode="json")), encoding="utf-8")
    if not waiting:
        waiting.append(_Ranks())
    return waiting[0].run(files)
