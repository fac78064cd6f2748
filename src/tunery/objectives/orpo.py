"""Odds ratio preference optimisation: fine-tuning on the chosen answer and preferring it, at once and without a
reference.

    L = -m_w - beta log s(log odds(m_w) - log odds(m_l)),   odds(m) = e^m / (1 - e^m)   Hong et al., arXiv:2403.07691,
                                                                                        eq. 6 and 7
m(y) = log pi(y|x) / |y| is the mean log-probability of an answer's token, s the logistic function, beta the paper's
lambda. Losses are summed over pairs; a step's weight is its number of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.pairs import answer_lengths, count_pairs, encode_pairs, pair_metrics, sequence_logps, split_pairs
from tunery.types import Batch, Loss, Policy


class Config(KindConfig):
    kind: str = "orpo"
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the fine-tuning (the paper's lambda)")


class Objective:
    """sum over pairs of L. The fine-tuning term is each chosen answer's own mean (as in LLaMA-Factory; TRL's is a mean
    over all tokens of a batch, which depends on how the step is cut), over the answer alone."""

    pairs = True

    rows, weight = staticmethod(encode_pairs), staticmethod(count_pairs)

    def __init__(self, config: Config):
        self.config = config

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        beta = self.config.beta
        logps_S = sequence_logps(batch, policy.logps(batch))
        mean_chosen_P, mean_rejected_P = split_pairs(logps_S / answer_lengths(batch))
        ratio_P = log_odds(mean_chosen_P) - log_odds(mean_rejected_P)
        total = (-mean_chosen_P - beta * F.logsigmoid(ratio_P)).sum()
        count = float(len(ratio_P))
        metrics = {
            "loss": (total.detach(), count),
            "nll/chosen": (-mean_chosen_P.detach().sum(), count),
            "log_odds_ratio": (ratio_P.detach().sum(), count),
        }
        rewards = beta * mean_chosen_P, beta * mean_rejected_P
        return Loss(total, {**metrics, **pair_metrics(*rewards, *split_pairs(logps_S))})


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logps). A probability of 1, or what rounding puts above it, gives a large number
    instead of infinity, and no gradient."""
    least = torch.finfo(logps.dtype).eps
    logps = logps.clamp(max=-least)
    return logps - torch.log(-torch.expm1(logps))
