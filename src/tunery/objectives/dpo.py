"""Direct preference optimisation: the policy is made to prefer the chosen answer more than the reference does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.pairs import count_pairs, encode_pairs, pair_metrics, sequence_logps, split_pairs
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens


class Config(KindConfig):
    kind: str = "dpo"
    beta: float = Field(0.1, gt=0, description="how strongly the policy is kept to the reference")
    reference: Literal["auto", "live", "cached"] = Field(
        "auto",
        description="the reference's log-probs: live (a forward of the starting weights beside each of the policy's), "
        "or cached (all of them in one pass before the first step, in a file of the run folder); auto: cached, but "
        "live with data.streaming",
    )


class Objective:
    """L = -log sigmoid(beta h), h = log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x), summed over pairs
    (Rafailov et al., arXiv:2305.18290, eq. 7)."""

    reference = True

    def __init__(self, config: Config):
        self.config = config

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return encode_pairs(examples, template)

    def weight(self, batch: Batch) -> Tensor:
        return count_pairs(batch)

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        beta = self.config.beta
        logps_S = sequence_logps(batch, policy.logps(batch))
        ratios_S = logps_S - sequence_logps(batch, policy.reference_logps(batch))
        chosen_P, rejected_P = split_pairs(ratios_S)
        losses_P = -F.logsigmoid(beta * (chosen_P - rejected_P))
        metrics = pair_metrics(beta * chosen_P, beta * rejected_P, *split_pairs(logps_S))
        total = losses_P.sum()
        return Loss(total, {"loss": (total.detach(), float(len(losses_P))), **metrics})
