"""Format by tags: <think>...</think><answer>...</answer>, each once, in order, and nothing outside them."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from tunery.rewards import RewardConfig
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "tags"
    tags: list[str] = Field(["think", "answer"], min_length=1, description="names of the tags, in their order")
    partial: bool = Field(
        False, description="a share for each tag that is there exactly once in its place, not all or nothing"
    )


class Reward:
    """All of it: 1 where the answer is the tags in order, each opened and closed once with text in between, with
    nothing but white space around them (the format reward of DeepSeek-R1, arXiv:2501.12948, section 2.2.2)."""

    def __init__(self, config: Config):
        self.config = config

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._one(answer.text) for answer in answers]

    def _one(self, text: str) -> float:
        marks = [mark for tag in self.config.tags for mark in (f"<{tag}>", f"</{tag}>")]
        once = [text.count(mark) == 1 for mark in marks]
        places = [text.find(mark) for mark in marks]
        if self.config.partial:
            in_place = [
                ok and all(places[j] < places[i] for j in range(i) if once[j]) for i, ok in enumerate(once)
            ]  # fmt: skip
            return sum(in_place) / len(marks)
        if not all(once) or places != sorted(places):
            return 0.0
        rest, full = text, True
        outside = []
        for tag in self.config.tags:
            before, _, rest = rest.partition(f"<{tag}>")
            inside, _, rest = rest.partition(f"</{tag}>")
            outside.append(before)
            full = full and bool(inside.strip())
        return float(full and not "".join([*outside, rest]).strip())
