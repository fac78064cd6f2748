"""What every contestant writes down in the same way: its steps, its peak memory, its versions."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "tunery")


def arguments() -> tuple[dict[str, Any], Path]:
    """The job and the settings, and the file to write to, from the command line."""
    spec, out = sys.argv[1:]
    return json.loads(Path(spec).read_text(encoding="utf-8")), Path(out)


def read_tokens(path: str) -> list[dict[str, list[int]]]:
    """Rows of {input_ids, labels}."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes. Not getrusage's, which begins with the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def finish(out: Path, steps: list[dict[str, float]], settings: dict[str, Any]) -> None:
    """Write what was measured. `steps`: loss, seconds and real tokens of each; `settings`: as the trainer had them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    result = {"steps": steps, "peak_bytes": peak_memory(), "versions": found, "settings": settings}
    out.write_text(json.dumps(result), encoding="utf-8")


class StepClock(TrainerCallback):
    """Wall time, loss and real tokens of each optimizer step of a transformers.Trainer, from the end of one step to the
    end of the next: data, forward, backward, update and logging. Needs `logging_steps=1`. `count`: tokens of a row."""

    def __init__(self, count: Callable[[Any], int] | None = None) -> None:
        self.count = count or real_tokens
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)  # inside accelerate's wrapper
        collate = loader.collate_fn

        def counted(rows: list[Any]) -> Any:
            self.tokens.append(sum(map(self.count, rows)))
            return collate(rows)

        loader.collate_fn = counted
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    @property
    def steps(self) -> list[dict[str, float]]:
        """A batch is collated ahead of its step, so there may be more counts than steps."""
        tokens = self.tokens[: len(self.seconds)]
        return [
            {"loss": loss, "seconds": seconds, "tokens": count}
            for loss, seconds, count in zip(self.losses, self.seconds, tokens, strict=True)
        ]


def real_tokens(row: Any) -> int:
    """Tokens of a row on its way to the collator that are no padding."""
    mask = row.get("attention_mask")
    return len(row["input_ids"]) if mask is None else sum(flag > 0 for flag in mask)


def packs_per_step(rows: list[dict[str, list[int]]], job: dict[str, Any]) -> int:
    """How many packs of the cut-off's length hold the rows of a step, on average."""
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    return max(1, round(job["batch_size"] * mean / job["max_length"]))
