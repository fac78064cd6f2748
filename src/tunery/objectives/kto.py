"""Kahneman-Tversky optimisation: from thumbs up and down instead of pairs.

With r = log pi(y|x) - log ref(y|x), summed over the answer's tokens:

    L = w_D (1 - s(beta (r - z)))   for a wanted answer,   w_U (1 - s(beta (z - r)))   for an unwanted one
    z = max(0, mean over the step of log pi(y'|x) - log ref(y'|x)),   y' the answer to another prompt of the step
                                                                     Ethayarajh et al., arXiv:2402.01306, eq. 7 and 8

s is the logistic function; z, the distance from the reference, gets no gradient. The answer y' to a step's i-th prompt
is that of its (i - 1)-th, the first's that of the last. `apo_zero` is the same with z = 0 (D'Oosterlinck et al.,
arXiv:2408.06266, its unpaired form). Losses are summed over answers; a step's weight is their number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field

from tunery.config import KindConfig
from tunery.pairs import answer_lengths, sequence_logps, unused_spans
from tunery.thumbs import LABEL, Metrics, count_sequences, encode_thumbs, mismatched, thumb_metrics
from tunery.types import Batch, Loss, Policy


class Config(KindConfig):
    kind: str = "kto"
    loss: Literal["kto", "apo_zero"] = Field("kto", description="apo_zero leaves the distance from the reference out")
    beta: float = Field(0.1, gt=0, description="how strongly the policy is kept to the reference")
    desirable_weight: float = Field(1.0, ge=0, description="of the wanted answers' losses")
    undesirable_weight: float = Field(
        1.0, ge=0, description="of the unwanted answers' losses; the paper: weight x number should be alike for both"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="adds this times each wanted answer's mean negative log-likelihood"
    )


class Objective:
    """sum over answers of L + sft_weight * mean_t -log pi(y_t) of the wanted ones. For z the reference runs beside
    the policy: which answers meet which prompts changes from step to step. A step of one example has no other answer,
    and takes z = 0."""

    reference = True

    rows, weight = staticmethod(encode_thumbs), staticmethod(count_sequences)
    unused = staticmethod(partial(unused_spans, objective="kto"))

    def __init__(self, config: Config):
        self.config = config
        self.z = 0.0
        self.observe = self._distance if config.loss == "kto" else None
        self.companions = mismatched if config.loss == "kto" else None

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config, wanted_S = self.config, batch.extra[LABEL].bool()
        logps_T = policy.logps(batch)
        ratios_S = sequence_logps(batch, logps_T - policy.reference_logps(batch))
        logps_S = sequence_logps(batch, logps_T)
        distance_S = config.beta * (ratios_S - self.z)
        losses_S = torch.where(
            wanted_S,
            config.desirable_weight * (-distance_S).sigmoid(),
            config.undesirable_weight * distance_S.sigmoid(),
        )
        total, count = losses_S.sum(), float(batch.n_sequences)
        metrics: Metrics = {"kl": (self.z * count, count)} if self.observe is not None else {}
        if config.sft_weight:
            nll_S = torch.where(wanted_S, -logps_S / answer_lengths(batch), 0.0)
            total = total + config.sft_weight * nll_S.sum()
            metrics["nll/chosen"] = (nll_S.detach().sum(), wanted_S.sum())
        metrics |= thumb_metrics((config.beta * ratios_S).detach(), logps_S, wanted_S)
        return Loss(total, {"loss": (total.detach(), count), **metrics})

    # ------------------------------------------------------------ z, a number of the whole step

    def _distance(self, policy: Policy, batch: Batch) -> Metrics:
        ratios_S = sequence_logps(batch, policy.logps(batch) - policy.reference_logps(batch))
        return {"kl": (ratios_S.sum(), float(batch.n_sequences))}

    def take_in(self, seen: Mapping[str, tuple[float, float]]) -> None:
        total, count = seen.get("kl", (0.0, 0.0))
        self.z = max(0.0, total / count) if count else 0.0

    def state(self) -> dict[str, Any]:
        """What a replay needs; a step does not depend on the one before."""
        return {"z": self.z}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.z = float(state["z"])
