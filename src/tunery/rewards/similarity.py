"""Likeness to the ground truth by chrF or BLEU, from 0 to 1: dense rewards for translation and rewriting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tunery.evaluate.text import bleu_tokenizer
from tunery.rewards import RewardConfig, needed
from tunery.types import Answer


class Config(RewardConfig):
    kind: str = "similarity"
    metric: Literal["chrf", "bleu"] = Field("chrf", description="chrF needs no words, so it is right for any script")
    column: str | None = Field(None, description="the column to compare with; null: the row's ground truth")


def name_of(config: Config) -> str:
    return config.metric


class Reward:
    """Sentence scores by sacrebleu (chrF: Popovic 2015; BLEU: Papineni et al. 2002, smoothed), divided by 100. Words
    are cut as in evaluate/text.py."""

    def __init__(self, config: Config):
        self.config = config

    def check(self, answers: Sequence[Answer]) -> None:
        needed(answers, self.config.column)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        pairs = zip(answers, needed(answers, self.config.column), strict=True)
        return [self._one(answer.text, truth) for answer, truth in pairs]

    def _one(self, text: str, truth: str) -> float:
        import sacrebleu  # here: half a second that other rewards need not wait

        if self.config.metric == "chrf":
            return sacrebleu.sentence_chrf(text, [truth]).score / 100
        return sacrebleu.sentence_bleu(text, [truth], tokenize=bleu_tokenizer([truth])).score / 100
