"""Exact match: 1 where the answer, or what a pattern finds in it, is the ground truth; else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field

from tunery.errors import ConfigError
from tunery.rewards import RewardConfig, needed
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "exact"
    column: str | None = Field(None, description="the column to compare with; null: the row's ground truth")
    pattern: str | None = Field(None, description="compare its last match (group 1 where it has one), not the whole")
    ignore_case: bool = Field(False, description="capital letters do not count")


class Reward:
    """White space at the ends does not count, and runs of it are as one space."""

    sandboxed = True  # for the pattern's sake

    def __init__(self, config: Config):
        self.config = config
        try:
            self.pattern = re.compile(config.pattern, re.DOTALL) if config.pattern is not None else None
        except re.error as error:
            raise ConfigError(f"rewards: exact.pattern {config.pattern!r} is no regular expression: {error}") from None

    def check(self, answers: Sequence[Answer]) -> None:
        needed(answers, self.config.column)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        truths = needed(answers, self.config.column)
        return [
            float(self._found(answer.text) == self._plain(truth)) for answer, truth in zip(answers, truths, strict=True)
        ]

    def _found(self, text: str) -> str | None:
        if self.pattern is None:
            return self._plain(text)
        matches = list(self.pattern.finditer(text))
        return self._plain(matches[-1][1 if self.pattern.groups else 0]) if matches else None

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.config.ignore_case else text
