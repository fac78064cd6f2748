"""Direct preference optimisation and its relatives: the policy is made to prefer the chosen answer more than its
reference does, without a reward model.

With r(y) = log pi(y|x) - log ref(y|x), summed over the answer's tokens, and h = r(chosen) - r(rejected):

    sigmoid       -log s(beta h)                                         DPO, Rafailov et al., arXiv:2305.18290, eq. 7
    hinge         max(0, 1 - beta h)                                     SLiC, Zhao et al., arXiv:2305.10425
    ipo           (hbar - 1 / (2 beta))^2                                IPO, Azar et al., arXiv:2310.12036, eq. 17
    sigmoid_norm  -log s(beta hbar)                                      length-normalised, Tulu 3, arXiv:2411.15124
    robust        [-(1 - e) log s(beta h) + e log s(-beta h)] / (1 - 2 e)    rDPO, Chowdhury et al., arXiv:2403.00409
    exo_pair      KL(p || q), p = s(+-beta h), q = (1 - e, e)            EXO, Ji et al., arXiv:2402.00856, eq. 16
    nca_pair      -log s(beta r_w) - [log s(-beta r_w) + log s(-beta r_l)] / 2   NCA, Chen et al., arXiv:2402.05369
    bco_pair      -log s(beta r_w - d) - log s(d - beta r_l)             BCO, Jung et al., arXiv:2404.04656
    sppo_hard     (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2        SPPO, Wu et al., arXiv:2405.00675, eq. 4.7
    discopop      (1 - m) log(1 + exp(-beta h)) + m exp(-beta h)         DiscoPOP, Lu et al., arXiv:2406.08414, eq. 5
    apo_zero      1 - s(beta r_w) + s(beta r_l)                          APO, D'Oosterlinck et al., arXiv:2408.06266
    apo_down      s(beta r_w) + 1 - s(beta h)                            the same

s is the logistic function, e label_smoothing, and m = s(beta h / tau). hbar is h with each r divided by the number of
its answer's tokens (for ipo, TRL reports that the authors' results were made so). d, BCO's reward shift, is the mean of
all rewards beta r seen so far, this step's among them. Losses are summed over pairs; a step's weight is its number of
pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from tunery.config import KindConfig, ShortForms
from tunery.pairs import (
    Metrics,
    answer_lengths,
    count_pairs,
    encode_pairs,
    pair_metrics,
    sequence_logps,
    smoothed,
    split_pairs,
    without_length,
)
from tunery.types import Batch, Loss, Policy

Name = Literal[
    "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "discopop",
    "apo_zero", "apo_down",
]  # fmt: skip
# Those that look at each answer's own distance from the reference, so that there must be one.
ABSOLUTE = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"}
SMOOTHED = {"sigmoid", "robust", "exo_pair"}


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Config(KindConfig):
    kind: str = "dpo"
    loss: Annotated[list[Name], BeforeValidator(_list), ShortForms()] = Field(
        ["sigmoid"], min_length=1, description="one, or several that are added, each times its weight"
    )
    loss_weights: list[float] | None = Field(None, description="of several losses; null: 1 each")
    beta: float = Field(0.1, gt=0, description="how strongly the policy is kept to the reference")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of pairs taken to be labelled the wrong way round (cDPO, robust, exo_pair)",
    )
    ld_alpha: float | None = Field(
        None, ge=0, le=1,
        description="LD-DPO (arXiv:2409.06411): weight of the tokens beyond the shorter answer's length; null: 1",
    )  # fmt: skip
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="RPO (arXiv:2404.19733): adds this times the chosen answer's mean negative log-likelihood",
    )
    discopop_tau: float = Field(0.05, gt=0, description="temperature of discopop's mixing")
    reference: Literal["auto", "live", "cached", "none"] = Field(
        "auto",
        description="the reference's log-probs: live (a forward of the starting weights beside each of the policy's), "
        "cached (all of them in one pass before the first step, in a file of the run folder), or none (as if all "
        "answers were alike to it); auto: cached, but live with data.streaming",
    )

    @model_validator(mode="after")
    def _together(self) -> Config:
        chosen = set(self.loss)
        if len(chosen) < len(self.loss):
            raise ValueError("loss: names one twice")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} weights for {len(self.loss)} losses")
        if self.label_smoothing and not chosen & SMOOTHED:
            raise ValueError(f"label_smoothing: is for {', '.join(sorted(SMOOTHED))}, not for {', '.join(self.loss)}")
        if "exo_pair" in chosen and not self.label_smoothing:
            raise ValueError("label_smoothing: exo_pair needs one above 0; its authors take 1e-3")
        if self.reference == "none" and chosen & ABSOLUTE:
            raise ValueError(f"reference: none leaves {', '.join(sorted(chosen & ABSOLUTE))} nothing to go by")
        return self


class Objective:
    """sum over pairs of sum_i w_i L_i + sft_weight * mean_t -log pi(chosen_t).

    The sft term is a mean over each answer's tokens and then over pairs (as in RPO and LLaMA-Factory's pref_ftx; TRL's
    `sft` loss is a mean over all tokens of a batch, which depends on how the step is cut)."""

    pairs = True

    rows, weight = staticmethod(encode_pairs), staticmethod(count_pairs)

    def __init__(self, config: Config):
        self.config = config
        self.reference = config.reference != "none"
        self.weights = dict(zip(config.loss, config.loss_weights or [1.0] * len(config.loss), strict=True))
        self.rewards_seen = (0.0, 0.0)  # sum and number, for BCO's shift
        # only bco_pair has a step looked at before its losses
        self.observe = self._rewards if "bco_pair" in self.weights else None
        self.only_training = True  # what an evaluation sees is not remembered

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config = self.config
        logps_T = policy.logps(batch)
        logps_S = sequence_logps(batch, logps_T)
        pairs = self._pairs(policy, batch, logps_T)
        total = logps_S.new_zeros(())
        metrics: Metrics = {}
        for name, weight in self.weights.items():
            losses_P = LOSSES[name](pairs, config)
            total = total + weight * losses_P.sum()
            if len(self.weights) > 1:
                metrics[f"loss/{name}"] = (losses_P.detach().sum(), pairs.count)
        if config.sft_weight:
            nll_P = -split_pairs(logps_S / answer_lengths(batch))[0]
            total = total + config.sft_weight * nll_P.sum()
            metrics["nll/chosen"] = (nll_P.detach().sum(), pairs.count)
        rewards = config.beta * pairs.chosen_P, config.beta * pairs.rejected_P
        metrics |= pair_metrics(*rewards, *split_pairs(logps_S))
        return Loss(total, {"loss": (total.detach(), pairs.count), **metrics})

    def _pairs(self, policy: Policy, batch: Batch, logps_T: Tensor) -> Pairs:
        """r of each answer, from the policy's log-probs of its tokens."""
        ratios_T = logps_T - policy.reference_logps(batch) if self.reference else logps_T
        if self.config.ld_alpha is not None:
            ratios_T = ratios_T * without_length(batch, self.config.ld_alpha)
        chosen_P, rejected_P = split_pairs(sequence_logps(batch, ratios_T))
        return Pairs(chosen_P, rejected_P, *split_pairs(answer_lengths(batch)), self._shift)

    # ------------------------------------------------------------ BCO's reward shift, a number of the whole step

    @property
    def _shift(self) -> float:
        total, count = self.rewards_seen
        return total / count if count else 0.0

    def _rewards(self, policy: Policy, batch: Batch) -> Metrics:
        """The rewards of a stream."""
        pairs = self._pairs(policy, batch, policy.logps(batch))
        return {"rewards": (self.config.beta * (pairs.chosen_P + pairs.rejected_P).sum(), 2 * pairs.count)}

    def take_in(self, seen: Mapping[str, tuple[float, float]]) -> None:
        """The same of all the step's streams and ranks."""
        total, count = seen.get("rewards", (0.0, 0.0))
        self.rewards_seen = (self.rewards_seen[0] + total, self.rewards_seen[1] + count)

    def state(self) -> dict[str, Any]:
        return {"rewards_seen": list(self.rewards_seen)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        total, count = state["rewards_seen"]
        self.rewards_seen = (total, count)


# ---------------------------------------------------------------- the losses, each [P]


@dataclass(frozen=True)
class Pairs:
    """r of the chosen and the rejected answers, and their lengths in tokens, all [P]; BCO's reward `shift`."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_length_P: Tensor
    rejected_length_P: Tensor
    shift: float = 0.0

    @property
    def count(self) -> float:
        return float(len(self.chosen_P))

    @property
    def margin_P(self) -> Tensor:
        """h"""
        return self.chosen_P - self.rejected_P

    @property
    def mean_margin_P(self) -> Tensor:
        """hbar"""
        return self.chosen_P / self.chosen_length_P - self.rejected_P / self.rejected_length_P


def _sigmoid(pairs: Pairs, config: Config) -> Tensor:
    """With label_smoothing: cDPO (Mitchell, 2023), the cross-entropy with labels that are wrong so often."""
    return smoothed(config.beta * pairs.margin_P, config.label_smoothing)


def _hinge(pairs: Pairs, config: Config) -> Tensor:
    return F.relu(1 - config.beta * pairs.margin_P)


def _ipo(pairs: Pairs, config: Config) -> Tensor:
    return (pairs.mean_margin_P - 1 / (2 * config.beta)).square()


def _sigmoid_norm(pairs: Pairs, config: Config) -> Tensor:
    return -F.logsigmoid(config.beta * pairs.mean_margin_P)


def _robust(pairs: Pairs, config: Config) -> Tensor:
    wrong, logits_P = config.label_smoothing, config.beta * pairs.margin_P
    return (-(1 - wrong) * F.logsigmoid(logits_P) + wrong * F.logsigmoid(-logits_P)) / (1 - 2 * wrong)


def _exo_pair(pairs: Pairs, config: Config) -> Tensor:
    wrong, logits_P = config.label_smoothing, config.beta * pairs.margin_P
    right = logits_P.sigmoid() * (F.logsigmoid(logits_P) - math.log1p(-wrong))
    return right + (-logits_P).sigmoid() * (F.logsigmoid(-logits_P) - math.log(wrong))


def _nca_pair(pairs: Pairs, config: Config) -> Tensor:
    chosen_P, rejected_P = config.beta * pairs.chosen_P, config.beta * pairs.rejected_P
    return -F.logsigmoid(chosen_P) - 0.5 * (F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P))


def _bco_pair(pairs: Pairs, config: Config) -> Tensor:
    chosen_P, rejected_P = config.beta * pairs.chosen_P, config.beta * pairs.rejected_P
    return -F.logsigmoid(chosen_P - pairs.shift) - F.logsigmoid(pairs.shift - rejected_P)


def _sppo_hard(pairs: Pairs, config: Config) -> Tensor:
    target = 0.5 / config.beta
    return (pairs.chosen_P - target).square() + (pairs.rejected_P + target).square()


def _discopop(pairs: Pairs, config: Config) -> Tensor:
    logits_P = config.beta * pairs.margin_P
    mixed_P = (logits_P / config.discopop_tau).sigmoid()
    return -F.logsigmoid(logits_P) * (1 - mixed_P) + (-logits_P).exp() * mixed_P


def _apo_zero(pairs: Pairs, config: Config) -> Tensor:
    return (-config.beta * pairs.chosen_P).sigmoid() + (config.beta * pairs.rejected_P).sigmoid()


def _apo_down(pairs: Pairs, config: Config) -> Tensor:
    return (config.beta * pairs.chosen_P).sigmoid() + (-config.beta * pairs.margin_P).sigmoid()


LOSSES: dict[str, Callable[[Pairs, Config], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "discopop": _discopop,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
