"""Continued pretraining: next-token prediction on plain text, every token trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens

_CONVERSATION = Refused("wrong objective", "the row is a conversation; objective: sft trains its answers")


class Config(KindConfig):
    kind: str = "pretrain"
    append_eos: bool = Field(True, description="end each document with the end-of-sequence token")


class Objective:
    """L = sum_t -log p(x_t | x_<t) over raw text. Documents longer than data.max_length are cut into consecutive
    sequences, so no token is lost."""

    def __init__(self, config: Config):
        self.config = config

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        texts = iter(
            template.encode_texts([e for e in examples if e.text is not None], append_eos=self.config.append_eos)
        )
        return [next(texts) if example.text is not None else _CONVERSATION for example in examples]

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        nll = policy.nll(batch)
        return Loss(nll, {"loss": (nll.detach(), batch.weights_T.sum())})
