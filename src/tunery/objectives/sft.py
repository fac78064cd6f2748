"""Supervised fine-tuning: the weighted negative log-likelihood of the answers' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens


class Config(KindConfig):
    kind: str = "sft"
    train_on: Literal["answers", "last", "all"] = Field(
        "answers", description="every assistant turn, the last one only, or the prompt as well"
    )


class Objective:
    """L = sum_t w_t * -log p(y_t | y_<t), with w_t = 0 outside the answers (Ouyang et al., arXiv:2203.02155)."""

    def __init__(self, config: Config):
        self.config = config

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return template.encode_many(examples, train=self.config.train_on)

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        nll = policy.nll(batch)
        return Loss(nll, {"loss": (nll.detach(), batch.weights_T.sum())})
