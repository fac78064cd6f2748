"""Language: the share of an answer's letters that are of one script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tunery.evaluate.text import HAN
from tunery.rewards import RewardConfig
from tunery.types import Answer

SCRIPTS = {
    "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "han": HAN,
    "kana": "\u3040-\u30ff\uff66-\uff9f",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "cyrillic": "\u0400-\u052f",
    "greek": "\u0370-\u03ff",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e00-\u0e7f",
}
LANGUAGES = {"en": ["latin"], "zh": ["han"], "ja": ["han", "kana"], "ko": ["hangul"], "ru": ["cyrillic"]}


class Config(RewardConfig):
    kind: str = "language"
    script: Literal[
        "en", "zh", "ja", "ko", "ru", "latin", "han", "kana", "hangul", "cyrillic", "greek", "arabic", "hebrew",
        "devanagari", "thai", "prompt",
    ] = Field("prompt", description="a script, or a language's; prompt: what most of the question is in")  # fmt: skip


class Reward:
    """0 to 1; 0 for an answer without letters (the language consistency reward of DeepSeek-R1, arXiv:2501.12948,
    section 2.3.2, counted in letters). Scripts tell languages apart only so far: English and French are both latin."""

    def __init__(self, config: Config):
        self.config = config

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> float | None:
        names = LANGUAGES.get(self.config.script, [self.config.script])
        if self.config.script == "prompt":
            asked = answer.prompt[-1].content if answer.prompt else ""
            shares = {script: _count(asked, [script]) for script in SCRIPTS}
            names = [max(shares, key=lambda script: shares[script])]
            if not shares[names[0]]:
                return None  # a question without letters asks for no language
        letters = sum(character.isalpha() for character in answer.text)
        return min(1.0, _count(answer.text, names) / letters) if letters else 0.0


def _count(text: str, scripts: Sequence[str]) -> int:
    inside = "".join(SCRIPTS[script] for script in scripts)
    return sum(character.isalpha() for character in re.findall(f"[{inside}]", text))
