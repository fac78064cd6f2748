"""Reward model: a number for a conversation, such that the better of two answers gets the larger one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from tunery.config import KindConfig
from tunery.pairs import count_pairs, encode_pairs, split_pairs, unused_spans, without_spans
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens


class Config(KindConfig):
    kind: str = "reward"
    center_rewards_coefficient: float | None = Field(
        None, ge=0, description="weight of the squared sum of a pair's rewards, which keeps them near 0; 0.01 is usual"
    )


class Objective:
    """L = -log sigmoid(r_w - r_l - m), summed over pairs: Bradley and Terry's model of the better and the worse answer
    (Ouyang et al., arXiv:2203.02155, eq. 1, without its mean over the pairs of one prompt), m the pair's own margin
    where the data give one, else 0 (Touvron et al., arXiv:2307.09288, eq. 2). With center_rewards_coefficient c, plus
    c (r_w + r_l)^2 (Eisenstein et al., arXiv:2312.09244, section 2.2): the model is the same, whatever is added to all
    rewards. r is the value of a scalar head at the last token of the conversation."""

    head = "score"
    pairs = True

    weight = staticmethod(count_pairs)
    unused = staticmethod(partial(unused_spans, objective="reward"))

    def __init__(self, config: Config):
        self.config = config

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return encode_pairs([without_spans(example) for example in examples], template)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        rewards_S = policy.values(batch, batch.ends_S)
        chosen_P, rejected_P = split_pairs(rewards_S)
        margins_P, _ = split_pairs(batch.extra.get("margin", torch.zeros_like(rewards_S)))
        losses_P = -F.logsigmoid(chosen_P - rejected_P - margins_P)
        if self.config.center_rewards_coefficient is not None:
            losses_P = losses_P + self.config.center_rewards_coefficient * (chosen_P + rejected_P).square()
        total = losses_P.sum()
        metrics = {
            "loss": losses_P,
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
            "rewards/accuracies": (chosen_P > rejected_P).float(),
            "rewards/margins": chosen_P - rejected_P,
            "rewards/mean": (chosen_P + rejected_P) / 2,
            "rewards/magnitude": (chosen_P.abs() + rejected_P.abs()) / 2,
        }
        pairs = float(len(losses_P))
        return Loss(total, {name: (value.detach().sum(), pairs) for name, value in metrics.items()})
