"""What a run's numbers say, in words, with the evidence. Pure functions of the history: no model, no files.

Every rule has to earn its place twice: it finds the trouble on a curve that has it, and keeps silent on an ordinary
noisy falling one. Noise is measured on the curve itself, so no rule knows what a normal loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunery.history import History


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`kind` is a fixed name to count or test by, `message` one or two sentences for a person with what to do,
    `evidence` the numbers they rest on."""

    kind: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What became of the training data. `read` rows in the files, `used` of them trained on, `refused` reason ->
    rows, `truncated` rows cut to fit; `tokens` and `labelled` (trained) tokens of one epoch; `eval_rows`."""

    read: int = 0
    used: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    labelled: int = 0
    eval_rows: int = 0


def diagnose(history: History, counts: DataCounts | None = None, *, total_steps: int | None = None) -> list[Diagnosis]:
    """Everything there is to say, the gravest first. `total_steps`: of the planned run."""
    return []
