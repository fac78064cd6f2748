"""Contrastive preference optimisation: DPO with a reference that finds all answers alike, held by fine-tuning on the
chosen one.

    L = l(beta (log pi(y_w|x) - log pi(y_l|x))) - sft_weight log pi(y_w|x) / |y_w|       Xu et al., arXiv:2401.08417,
                                                                                         eq. 3 and 4
l(h) is -log s(h) (sigmoid), max(0, 1 - h) (hinge), or, for ipo, (hbar - 1 / (2 beta))^2 with hbar the difference of the
mean log-probabilities of the answers' tokens. Losses are summed over pairs; a step's weight is its number of pairs."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.pairs import answer_lengths, count_pairs, encode_pairs, pair_metrics, sequence_logps, smoothed, split_pairs
from tunery.types import Batch, Loss, Policy


class Config(KindConfig):
    kind: str = "cpo"
    loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="of the difference between the answers")
    beta: float = Field(0.1, gt=0, description="how much a difference in log-probability counts")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way round (sigmoid)"
    )
    sft_weight: float = Field(1.0, ge=0, description="weight of the chosen answer's mean negative log-likelihood")

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing: is for sigmoid, not for {self.loss}")
        return self


class Objective:
    """sum over pairs of L. The paper sums the fine-tuning term over the answer's tokens; here, as in TRL and
    LLaMA-Factory, long answers count no more than short ones, and, unlike TRL's, it does not depend on what else is in
    the batch: each answer has its own mean."""

    pairs = True

    rows, weight = staticmethod(encode_pairs), staticmethod(count_pairs)

    def __init__(self, config: Config):
        self.config = config

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config = self.config
        logps_S = sequence_logps(batch, policy.logps(batch))
        chosen_P, rejected_P = split_pairs(logps_S)
        mean_chosen_P, mean_rejected_P = split_pairs(logps_S / answer_lengths(batch))
        total = _preference(config, chosen_P - rejected_P, mean_chosen_P - mean_rejected_P).sum()
        total = total - config.sft_weight * mean_chosen_P.sum()
        count = float(len(chosen_P))
        metrics = {"loss": (total.detach(), count), "nll/chosen": (-mean_chosen_P.detach().sum(), count)}
        rewards = pair_metrics(config.beta * chosen_P, config.beta * rejected_P, chosen_P, rejected_P)
        return Loss(total, {**metrics, **rewards})


def _preference(config: Config, margin_P: Tensor, mean_margin_P: Tensor) -> Tensor:
    """l of each pair, [P]."""
    if config.loss == "ipo":
        return (mean_margin_P - 1 / (2 * config.beta)).square()
    logits_P = config.beta * margin_P
    return F.relu(1 - logits_P) if config.loss == "hinge" else smoothed(logits_P, config.label_smoothing)
