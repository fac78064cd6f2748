"""What happened in a run, step by step: kept in memory, and in `steps.jsonl`, one line per optimizer step and
evaluation, from which a resumed run picks up its curve, its clock and its half-finished averages exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tunery.errors import TuneryError
from tunery.files import json_line, number, write_text


@dataclass(slots=True)
class Step:
    """One optimizer step. `loss` is its mean over `weight` (labelled tokens; pairs for preferences); `tokens` are
    real tokens, `examples` rows, both over all ranks; `seconds` is the step's own time, `elapsed` the run's clock
    after it (evaluation and saving included); `metrics` name -> (sum, weight)."""

    step: int
    loss: float
    weight: float
    lr: float
    grad_norm: float | None
    tokens: int
    examples: int
    epoch: float
    seconds: float
    elapsed: float
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Evaluation:
    """The held-out loss after a step (mean over labelled tokens), and whatever else was measured there."""

    step: int
    eval_loss: float
    epoch: float
    elapsed: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class History:
    """Steps and evaluations, each in order of `step`."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def elapsed(self) -> float:
        """Seconds on the run's clock when the last thing was recorded."""
        ends = [records[-1].elapsed for records in (self.steps, self.evaluations) if records]
        return max(ends, default=0.0)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the lowest loss; the earliest of equals."""
        return min(self.evaluations, key=lambda evaluation: evaluation.eval_loss, default=None)

    def evaluation_at(self, step: int) -> Evaluation | None:
        return next((evaluation for evaluation in reversed(self.evaluations) if evaluation.step == step), None)


class LineFile:
    """A .jsonl file that is appended to while a run goes on. Opening it cuts everything after `start_step` away (all
    of it for 0), so that nothing repeats or jumps; the cut is one atomic rewrite. `key` is the step's name in it."""

    def __init__(self, path: Path, key: str, start_step: int):
        self.path, self.key = path, key
        self.lines_kept = cut_lines(path, key, start_step)
        self._rewrite(self.lines_kept)

    def add(self, line: dict[str, Any]) -> None:
        """Append; handed to the operating system when this returns, so killing the process does not lose it."""
        self._file.write(json_line(line))
        self._file.flush()

    def remove(self, step: int, having: str) -> None:
        """Take back the lines of `step` that have the key `having`, because it is measured again."""
        lines = cut_lines(self.path, self.key, start_step=step + 1)
        self._file.close()
        self._rewrite([line for line in lines if not (line[self.key] == step and having in line)])

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        write_text(self.path, "".join(json_line(line) for line in lines))
        self._file: TextIO = self.path.open("a", encoding="utf-8")


def cut_lines(path: Path, key: str, start_step: int) -> list[dict[str, Any]]:
    """The lines of a .jsonl file whose `key` is at most `start_step`; none for start_step 0 or a missing file.
    A half-written last line (the process was killed) is cut too; damage elsewhere raises TuneryError."""
    if start_step <= 0 or not path.exists():
        return []
    kept: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for row, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if row == len(lines):
                break
            raise TuneryError(f"{path}: line {row} is not JSON; restore the file or remove it to go on") from None
        if int(value[key]) <= start_step:
            kept.append(value)
    return kept


def read_history(lines: Iterable[dict[str, Any]]) -> History:
    """The history that the lines of a steps.jsonl tell."""
    history = History()
    for line in lines:
        if "eval_loss" in line:
            metrics = {name: number(value) for name, value in line["metrics"].items()}
            line = line | {"eval_loss": number(line["eval_loss"]), "metrics": metrics}
            history.evaluations.append(Evaluation(**line))
        else:
            pairs = {name: (number(total), number(weight)) for name, (total, weight) in line["metrics"].items()}
            norm = None if line["grad_norm"] is None else number(line["grad_norm"])
            history.steps.append(Step(**line | {"loss": number(line["loss"]), "grad_norm": norm, "metrics": pairs}))
    return history


# ------------------------------------------------------------ measures of several steps


def window_means(steps: Sequence[Step]) -> dict[str, float]:
    """The exact mean loss and metrics over several steps: sums over sums, never an average of averages."""
    weight = math.fsum(step.weight for step in steps)
    means = {"loss": math.fsum(step.loss * step.weight for step in steps) / weight if weight else math.nan}
    for name in dict.fromkeys(name for step in steps for name in step.metrics):
        pairs = [step.metrics[name] for step in steps if name in step.metrics]
        total = math.fsum(pair[1] for pair in pairs)
        means[name] = math.fsum(pair[0] for pair in pairs) / total if total else math.nan
    return means


def tokens_per_second(steps: Sequence[Step]) -> float:
    """Real tokens per second of training: the time of evaluating and saving is left out."""
    seconds = math.fsum(step.seconds for step in steps)
    return sum(step.tokens for step in steps) / seconds if seconds > 0 else 0.0
