"""Simple preference optimisation: the mean log-probability of a token is the reward, so there is no reference.

    L = -log s(beta (m_w - m_l) - gamma),   m(y) = log pi(y|x) / |y|        Meng et al., arXiv:2405.14734, eq. 6

s is the logistic function; m_w, m_l are those of the chosen and the rejected answer. Losses are summed over pairs; a
step's weight is its number of pairs."""

from __future__ import annotations

from pydantic import Field

from tunery.config import KindConfig
from tunery.pairs import (
    Metrics,
    answer_lengths,
    count_pairs,
    encode_pairs,
    pair_metrics,
    sequence_logps,
    smoothed,
    split_pairs,
)
from tunery.types import Batch, Loss, Policy


class Config(KindConfig):
    kind: str = "simpo"
    beta: float = Field(2.0, gt=0, description="how much a difference in mean log-probability counts")
    gamma: float = Field(1.0, ge=0, description="the margin by which the chosen answer's reward should be higher")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way round"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="adds this times the chosen answer's mean negative log-likelihood (CPO-SimPO)"
    )


class Objective:
    """sum over pairs of L + sft_weight * -m_w. Where TRL adds a negative log-likelihood, it is a mean over all tokens
    of a batch, which depends on how the step is cut; here it is each answer's own."""

    pairs = True

    rows, weight = staticmethod(encode_pairs), staticmethod(count_pairs)

    def __init__(self, config: Config):
        self.config = config

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config = self.config
        logps_S = sequence_logps(batch, policy.logps(batch))
        mean_chosen_P, mean_rejected_P = split_pairs(logps_S / answer_lengths(batch))
        rewards = config.beta * mean_chosen_P, config.beta * mean_rejected_P
        logits_P = rewards[0] - rewards[1] - config.gamma
        total = smoothed(logits_P, config.label_smoothing).sum()
        metrics: Metrics = {}
        if config.sft_weight:
            total = total - config.sft_weight * mean_chosen_P.sum()
            metrics["nll/chosen"] = (-mean_chosen_P.detach().sum(), float(len(mean_chosen_P)))
        metrics |= pair_metrics(*rewards, *split_pairs(logps_S))
        return Loss(total, {"loss": (total.detach(), float(len(logits_P))), **metrics})
