"""Pattern: 1 where a regular expression matches the answer (or its whole), else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field

from tunery.errors import ConfigError
from tunery.rewards import RewardConfig
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "regex"
    pattern: str = Field(description="a regular expression (Python's); . matches line breaks too")
    whole: bool = Field(False, description="the whole answer must match, not a part of it")


class Reward:
    """A pattern may take for ever on an unlucky text, so it is matched in the sandbox."""

    sandboxed = True

    def __init__(self, config: Config):
        try:
            pattern = re.compile(config.pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(f"rewards: regex.pattern {config.pattern!r} is no regular expression: {error}") from None
        self._match = pattern.fullmatch if config.whole else pattern.search

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [float(self._match(answer.text) is not None) for answer in answers]
