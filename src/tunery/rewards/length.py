"""Length: near a target, or DAPO's soft penalty for answers that come close to the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from tunery.rewards import RewardConfig
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "length"
    unit: Literal["tokens", "characters", "words"] = Field("tokens", description="what is counted")
    target: int | None = Field(None, gt=0, description="1 at this length, falling to 0 at none and at twice as much")
    limit: int | None = Field(None, gt=0, description="0 up to limit - buffer, falling to -1 at the limit and beyond")
    buffer: int = Field(0, ge=0, description="length of the fall before the limit")

    @model_validator(mode="after")
    def _one_of_them(self) -> Config:
        if (self.target is None) == (self.limit is None):
            raise ValueError("length takes either a target or a limit")
        if self.limit is not None and self.buffer > self.limit:
            raise ValueError(f"buffer {self.buffer} is longer than the limit {self.limit}")
        return self


class Reward:
    """With a target: 1 - |n - target| / target, at least 0. With a limit: the soft overlong punishment of DAPO (Yu et
    al., arXiv:2503.14476, eq. 13), with L_max the limit and L_cache the buffer."""

    def __init__(self, config: Config):
        self.config = config

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._one(self._count(answer)) for answer in answers]

    def _count(self, answer: Answer) -> int:
        if self.config.unit == "tokens":
            return len(answer.ids)
        return len(answer.text) if self.config.unit == "characters" else len(answer.text.split())

    def _one(self, n: int) -> float:
        target, limit, buffer = self.config.target, self.config.limit, self.config.buffer
        if target is not None:
            return max(0.0, 1 - abs(n - target) / target)
        assert limit is not None
        if n <= limit - buffer:
            return 0.0
        return -1.0 if n > limit else (limit - buffer - n) / buffer
