"""A few answers of each rollout as lines of `rollouts.jsonl`, to be read: numbers alone do not show a hacked reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunery.history import LineFile
from tunery.objectives._generated import places
from tunery.types import Sample

FILE = "rollouts.jsonl"
LOOKS = 10  # times in a run that an answer is shown on the console
WIDTH = 300  # characters of it


class RolloutLog:
    """Writes `shown` answers of each rollout to the run folder `output`; what was written after step `start` is cut
    away first (resuming). `say`, once there, is called with a text for the console LOOKS times in `total` steps."""

    def __init__(self, output: Path, shown: int, start: int, total: int):
        self.output, self.shown, self.start = output, shown, start
        self.say: Callable[[str], None] = lambda text: None
        self._every = max(1, total // LOOKS)
        self._next = start
        self._file: LineFile | None = None

    def add(self, step: int, groups: Sequence[Sequence[Sample]]) -> None:
        """`step` (1-based): the first that is made of these groups."""
        if self._file is None:
            self._file = LineFile(self.output / FILE, "step", self.start)
        for sample in _spread([sample for group in groups for sample in group], self.shown):
            self._file.add({"step": step, **line(sample)})
        if step > self._next and groups:
            self._next = step + self._every
            best = max((sample for group in groups for sample in group), key=_worth)
            self.say(f"step {step}: an answer worth {best.reward}: {best.answer.text[:WIDTH]!r}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def line(sample: Sample) -> dict[str, Any]:
    """What is worth knowing of a sample, in plain values."""
    answer = sample.answer
    advantages = sample.tokens.extra.get("advantages")
    at = places(sample.tokens)
    return {
        "row": answer.where,
        "prompt": [{"role": message.role, "content": message.content} for message in answer.prompt],
        "completion": answer.text,
        "finish": answer.finish,
        "tokens": len(answer.ids),
        "ground_truth": answer.ground_truth,
        "rewards": sample.rewards,
        "reward": sample.reward,
        "advantage": float(advantages[at].mean()) if advantages is not None and len(at) else None,
    }


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """So many of them, from all over."""
    return samples[:: max(1, len(samples) // count)][:count] if count else []


def _worth(sample: Sample) -> float:
    return -math.inf if sample.reward is None else sample.reward
