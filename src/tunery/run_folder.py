"""The run folder: what is in it, whether a run can go on in it, and that two runs never mix there."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from tunery import __version__, checkpoint
from tunery.config_file import read_config
from tunery.data.dataset import Prepared
from tunery.data.store import TokenStore
from tunery.errors import ConfigError, DataError
from tunery.files import write_json, write_text
from tunery.job import Job
from tunery.rollout.samples import make_answer
from tunery.types import Example

CONFIG, REFUSED, DATA = "tunery.yaml", "data_refused.jsonl", "data_report.json"
# What may change between a run and its resume without changing the result.
FREE = {"output", "report", "train.resume", "train.log_every", "train.save_every", "train.keep", "train.micro_tokens",
        "train.checkpointing", "train.packing", "data.workers", "data.cache", "eval.generate",
        "eval.max_new_tokens", "adapter.cache", "rollout.shown", "objective.reference"}  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    found = {"tunery": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_config(job: Job, folder: Path) -> None:
    """tunery.yaml: the resolved configuration, which reproduces the run, with the versions as a comment."""
    head = "# " + ", ".join(f"{name} {number}" for name, number in versions().items())
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, f"{head}\n{text}")


def find_resume(job: Job, output: Path) -> Path | None:
    """The checkpoint to go on from: named, or the newest in the run folder."""
    if isinstance(job.train.resume, str):
        folder = Path(job.train.resume)
        checkpoint.load_state(folder)
        return folder
    found = checkpoint.list_checkpoints(output)
    return found[-1][1] if job.train.resume and found else None


def is_finished(job: Job, output: Path) -> bool:
    """Whether the run folder already holds this very run, finished."""
    if job.train.resume is not True or not (output / "all_results.json").is_file():
        return False
    return (output / CONFIG).is_file() and not changed_keys(job, output / CONFIG)


def changed_keys(job: Job, saved: Path) -> list[str]:
    """Keys that differ from the saved configuration in a way that would change the result."""
    then, now = _flat(read_config(saved)), _flat(job.model_dump(mode="json"))
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in FREE)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def open_folder(job: Job, output: Path, resume: Path | None, is_main: bool) -> None:
    """Make the run folder ready: refuse to mix two runs in it, and lose nothing that is there."""
    saved = output / CONFIG
    if resume is not None and saved.is_file() and resume.parent.resolve() != output.resolve():
        raise ConfigError(
            f"output: {output} holds a run of its own, and train.resume is a checkpoint of another ({resume}); "
            "give another output"
        )
    if resume is not None and saved.is_file():
        changed = changed_keys(job, saved)
        if changed:
            raise ConfigError(
                f"output: {output} holds a run with another configuration ({', '.join(changed[:8])} differ); "
                "give another output, or train.resume=false to start anew beside it"
            )
    if not is_main:
        return
    if resume is None and saved.is_file():
        number = next(n for n in range(1, 10_000) if not output.with_name(f"{output.name}.old-{n}").exists())
        output.rename(output.with_name(f"{output.name}.old-{number}"))
    checkpoint.check_room(output, 0)


def data_identity(data: Prepared) -> dict[str, str | None]:
    """Hashes of the tokenised rows and, where answers are generated, of what rewards read of them besides; None for a
    stream, whose rows are not known beforehand."""
    train = data.train.fingerprint() if isinstance(data.train, TokenStore) else None
    found = {"train": train, "eval": data.eval.fingerprint() if data.eval is not None else None}
    if not data.train_examples:
        return found
    read = {"train": data.train_examples, "eval": data.eval_examples}
    return {name: f"{hashed}-{_columns_hash(read[name])}" if hashed else None for name, hashed in found.items()}


def _columns_hash(examples: Sequence[Example]) -> str:
    """Of the ground truth and the columns of these rows."""
    total = hashlib.blake2b(digest_size=16)
    for answer in map(make_answer, examples):
        total.update(json.dumps([answer.ground_truth, answer.columns], sort_keys=True, default=str).encode())
    return total.hexdigest()


def same_data(data: Prepared, output: Path) -> None:
    """Refuse to go on, or to call a run finished, with other rows than it began with. Raises DataError."""
    saved = output / DATA
    if not saved.is_file():
        return
    then = json.loads(saved.read_text(encoding="utf-8"))["identity"]
    changed = [name for name, now in data_identity(data).items() if now != then.get(name)]
    if changed:
        raise DataError(
            f"output: {output} holds a run on other rows: the {' and '.join(changed)} data have changed since; "
            "give another output, or train.resume=false to start anew beside it"
        )


def write_data_report(data: Prepared, output: Path) -> None:
    """What became of the rows (data_report.json), and each refused one (data_refused.jsonl)."""
    write_json(output / DATA, {"identity": data_identity(data), **data.report.to_dict()})
    data.report.write_refused(output / REFUSED)
