"""Rewards: what a generated answer is worth, one kind a file, and the folder is the registry. A kind has

    class Config(RewardConfig): kind: str = "<the file's name>"; its options
    class Reward:
        def __init__(self, config)                          raises ConfigError for options that cannot be
        def score(self, answers) -> list[float | None]      one number for each answer; None: does not apply to it

and may have `sandboxed = True`: it runs code or patterns of the user's, which may hang or crash, so it is called in a
process of its own (rollout/sandbox.py); `check(answers)`, which raises RewardError for rows it could never score; and,
unless it is sandboxed, `load(host) -> list[str]`, called once before anything is scored, with the policy that it is to
judge (Host): for what is large, and comes after all that can be wrong without it. It gives what a person should know
of it. `name` of a reward in logs is its config's, or `name_of(config)` where the module has one,
or the kind. A dotted kind is a module from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from tunery.config import KindConfig
from tunery.errors import RewardError
from tunery.types import Answer

if TYPE_CHECKING:
    from tunery.models.load import ModelConfig


@dataclass(frozen=True, slots=True)
class Host:
    """What rewards stand beside: the policy's `model` (with its adapter), the `source` its base was loaded from, why
    what is in memory is not that any more (`changed`, the end of a sentence with "because"; None: it is), and its
    `tokenizer` and `template`."""

    model: Any
    source: ModelConfig
    changed: str | None
    tokenizer: Any = None
    template: Any = None


class RewardConfig(KindConfig):
    """Base of every reward's `Config`."""

    weight: float = Field(1.0, description="of this reward in the sum")
    name: str | None = Field(None, description="its name in logs; null: its kind's")


class Reward(Protocol):
    """Scores answers."""

    def score(self, answers: Sequence[Answer], /) -> list[float | None]: ...


def last_question(answer: Answer) -> str:
    """The text of the turn that an answer follows."""
    return answer.prompt[-1].content if answer.prompt else ""


def needed(answers: Sequence[Answer], column: str | None = None) -> list[str]:
    """The ground truth of each answer (or its `column`) as text. Raises RewardError naming the row that has none."""
    found: list[str] = []
    for answer in answers:
        value: Any = answer.ground_truth if column is None else answer.columns.get(column)
        if value is None:
            what = "no ground truth (a final assistant turn, or a column ground_truth, solution or answer)"
            raise RewardError(f"{answer.where}: the row has {what if column is None else f'no column {column!r}'}")
        found.append(value if isinstance(value, str) else str(value))
    return found
