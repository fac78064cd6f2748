"""Math answer: 1 where the answer's number (boxed, or the last one) equals the ground truth's, else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from pydantic import Field

from tunery.rewards import RewardConfig, needed
from tunery.types import Answer

_NUMBER = re.compile(
    r"(?P<sign>[-\u2212+]?)(?P<gap>\s*)(?:\\?[$\u00a5\u20ac\u00a3]\s*)?"
    r"(?:\\[dt]?frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?=\.?\d)(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<point>\.\d+)?(?P<power>[eE][-+]?\d{1,3})?"
    r"(?:\s*/\s*(?P<under>\d+))?)\s*(?P<percent>\\?%)?"
)


MOST_DIGITS = 1000


class Config(RewardConfig):
    kind: str = "math"
    column: str | None = Field(None, description="the column that holds the right number; null: the ground truth")
    tolerance: float = Field(1e-6, ge=0, description="largest relative difference that counts as equal")
    boxed: bool = Field(False, description="only a \\boxed{...} answer counts, not the last number of the text")


class Reward:
    """Numbers are whole, decimal, with thousands' commas, fractions (3/4, \\frac{3}{4}), percentages and powers of ten
    (2e3). Where the ground truth has no number, the texts must be equal (an answer such as "x+1")."""

    def __init__(self, config: Config):
        self.config = config

    def check(self, answers: Sequence[Answer]) -> None:
        needed(answers, self.config.column)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._one(a.text, truth) for a, truth in zip(answers, needed(answers, self.config.column), strict=True)]

    def _one(self, text: str, truth: str) -> float:
        given = last_boxed(text)
        if given is None and self.config.boxed:
            return 0.0
        wanted = final_answer(truth)
        right = last_number(wanted)
        found = last_number(given if given is not None else text)
        if right is None:
            return float("".join((given if given is not None else text).split()) == "".join(wanted.split()))
        if found is None:
            return 0.0
        return float(abs(found - right) <= Fraction(self.config.tolerance) * max(abs(right), abs(found)))


def final_answer(truth: str) -> str:
    """What a worked solution ends with: what is boxed, or stands after GSM8K's ####, or all of it."""
    boxed = last_boxed(truth)
    return boxed if boxed is not None else truth.rpartition("####")[2].strip()


def last_boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...}, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly."""
    found = None
    for match in _NUMBER.finditer(text):
        value = _value(match, text)
        found = value if value is not None else found
    return found


def _value(match: re.Match[str], text: str) -> Fraction | None:
    if len(match.group()) > MOST_DIGITS:  # a model that repeats itself; Python reads no such numbers
        return None
    if match["top"] is not None:
        if not int(match["bottom"]):
            return None
        value = Fraction(int(match["top"]), int(match["bottom"]))
    else:
        value = Fraction((match["whole"] or "0").replace(",", "") + (match["point"] or "") + (match["power"] or ""))
        if match["under"] is not None:
            if not int(match["under"]):
                return None
            value /= int(match["under"])
    # In "12-5" and "3 - 4" the sign is an operation's, in "and -4" and "x=-4" the number's.
    operation = match["gap"] or text[: match.start()][-1:].isalnum() or text[: match.start()][-1:] in (")", "}")
    negative = match["sign"] in ("-", "\u2212") and not operation
    value = -value if negative else value
    return value / 100 if match["percent"] else value
