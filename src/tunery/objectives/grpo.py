"""Group relative policy optimization, and its relatives: several answers to a prompt, judged by one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.objectives._clipping import (
    Metrics,
    against_generator,
    clipped,
    importance,
    kl_to_reference,
    of_sequences,
    old_logps,
)
from tunery.objectives._generated import places, prompt_rows, put
from tunery.types import Batch, Example, Loss, Policy, Refused, Sample, Tokens

TINY = 1e-4  # added to a standard deviation before dividing by it


class Config(KindConfig):
    kind: str = "grpo"
    loss: Literal["dapo", "grpo", "dr_grpo"] = Field(
        "dapo", description="mean over tokens (dapo), over answers' own means (grpo), over answers x longest (dr_grpo)"
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="ratio of probabilities of tokens, or answers (GSPO)"
    )
    advantage: Literal["group", "rloo", "reinforce++"] = Field(
        "group", description="reward less the group's mean, less the others' mean, or normalised over the batch"
    )
    scale: Literal["group", "batch", "none"] | None = Field(
        None,
        description="divide by the rewards' deviation in the group, the batch, or not; null: as usual",
    )
    clip_low: float = Field(0.2, gt=0, description="the ratio is clipped below 1 - this")
    clip_high: float | None = Field(None, gt=0, description="and above 1 + this (DAPO: 0.28); null: as clip_low")
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from where training began")
    kl_unbiased: bool = Field(
        True,
        description="times the ratio, so that its gradient is that of the divergence (DeepSeek-V3.2); false: plain",
    )
    correction: float | None = Field(
        None,
        gt=0,
        description="weigh by engine over generator probability, at most this (2 is usual); null: not",
    )

    @model_validator(mode="after")
    def _honest(self) -> Config:
        usual = _SCALES[self.advantage]
        if self.scale is not None and self.advantage != "group" and self.scale != usual:
            raise ValueError(f"advantage {self.advantage} has scale {usual}, not {self.scale}")
        return self


_SCALES = {"group": "group", "rloo": "none", "reinforce++": "batch"}


class Objective:
    """GRPO (Shao et al., arXiv:2402.03300, eq. 3), of the answers o_i to a prompt, i = 1..G, with rewards R_i:

        L = sum_i sum_t w_it * ( -min(r_it A_it, clip(r_it, 1 - low, 1 + high) A_it) + beta * r_it * k3_it )

    r_it is the probability of token t now over that when it was generated (the paper has no r_it before k3, and so not
    the divergence's gradient: `kl_unbiased`; DeepSeek-V3.2, arXiv:2512.02556, section 3.1). With `ratio: sequence` it
    is that of the whole answer, s_i = exp(mean_t log r_it), for each of its tokens (GSPO, Zheng et al.,
    arXiv:2507.18071, eq. 7).

    `loss` says what the sum is divided by. "dapo": by all tokens of the step (DAPO, Yu et al., arXiv:2503.14476,
    eq. 8; what TRL calls bnpo is the same here, since a step is divided once); "grpo": w_it = 1 / |o_i|, by answers;
    "dr_grpo": by the answers times max_new_tokens, so that neither an answer's length nor the group's deviation moves
    it (Dr. GRPO, Liu et al., arXiv:2503.20783; use with `scale: none`).

    A_it: "group" (R_i - mean R) / (std R + 1e-4), with the unbiased deviation (as TRL; eq. 1 leaves it open), or that
    of the whole batch, or without; "rloo" R_i - the mean of the other R_j (Ahmadian et al., arXiv:2402.14740, eq. 8, in
    the clipped loss); "reinforce++" R_i - beta * sum of log(p_old / p_ref) over the tokens from t on, normalised by
    mean and deviation over all tokens of the batch (Hu, arXiv:2501.03262): there beta acts in the reward alone.

    An answer that no reward applies to has A = 0 and no part in its group's statistics."""

    generates = True

    def __init__(self, config: Config):
        self.config = config
        self.reference = config.beta > 0
        self.high = config.clip_low if config.clip_high is None else config.clip_high
        self.scale = config.scale or _SCALES[config.advantage]
        self.least_group = 1 if config.advantage == "reinforce++" else 2
        self.kl_in_reward = self.reference and config.advantage == "reinforce++"

    # ------------------------------------------------------------ prompts, and what becomes of their answers

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return prompt_rows(examples, template)

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """The reference's log-probabilities, and where they enter the reward the policy's own, [T] each."""
        found = {"reference_logps": policy.reference_logps(batch)} if self.reference else {}
        return found | {"old_logps": policy.logps(batch)} if self.kl_in_reward else found

    def judge(self, groups: Sequence[Sequence[Sample]]) -> Metrics:
        """`advantages` of each token, from the rewards of all groups of the rollout."""
        if self.config.advantage == "reinforce++":
            self._over_tokens([sample for group in groups for sample in group])
            return {}
        judged = [sample.reward for group in groups for sample in group if sample.reward is not None]
        spread = deviation(np.array(judged))
        for group in groups:
            advantages = self._of_group([sample.reward for sample in group], spread)
            for sample, advantage in zip(group, advantages, strict=True):
                put(sample.tokens, "advantages", advantage)
        return {}

    def _of_group(self, rewards: Sequence[float | None], spread: float) -> np.ndarray:
        """Advantages of a group's answers, float64 [G]. `spread`: the deviation over the batch."""
        r_G = np.array([np.nan if reward is None else reward for reward in rewards], dtype=np.float64)
        there = ~np.isnan(r_G)
        count = int(there.sum())
        if count < 2:  # nothing to compare with
            return np.zeros(len(r_G))
        advantages_G = r_G - r_G[there].mean()
        if self.config.advantage == "rloo":
            advantages_G *= count / (count - 1)  # R_i - mean of the others, in terms of the mean of all
        elif self.scale != "none":
            advantages_G /= (deviation(r_G[there]) if self.scale == "group" else spread) + TINY
        return np.where(there, advantages_G, 0.0)

    def _over_tokens(self, samples: Sequence[Sample]) -> None:
        returns = []
        for sample in samples:
            at = places(sample.tokens)
            returns_n = np.full(len(at), np.nan if sample.reward is None else sample.reward, dtype=np.float64)
            if self.kl_in_reward:
                kl_n = (sample.tokens.extra["old_logps"] - sample.tokens.extra["reference_logps"])[at]
                returns_n -= self.config.beta * kl_n[::-1].cumsum()[::-1]
            returns.append(returns_n)
        everything = np.concatenate(returns) if returns else np.zeros(0)
        everything = everything[~np.isnan(everything)]
        mean, spread = (float(everything.mean()), deviation(everything)) if len(everything) else (0.0, 0.0)
        for sample, returns_n in zip(samples, returns, strict=True):
            put(sample.tokens, "advantages", np.nan_to_num((returns_n - mean) / (spread + TINY), nan=0.0))

    # ------------------------------------------------------------ the loss

    def weight(self, batch: Batch) -> Tensor:
        if self.config.loss == "grpo":
            return torch.tensor(float(batch.n_sequences))
        return batch.weights_T.sum() if self.config.loss == "dapo" else batch.extra["limit"].sum()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        logps_N = policy.logps(batch)[batch.labelled_N]
        old_N, count = old_logps(batch, logps_N), len(logps_N)
        # a plan looks at shapes alone, and its streams have no advantages
        advantages_N = batch.extra.get("advantages", batch.weights_T)[batch.labelled_N].to(logps_N)
        log_ratio_N = logps_N - old_N
        if self.config.ratio == "sequence":
            log_ratio_N = of_sequences(log_ratio_N, batch)
        found = clipped(log_ratio_N, advantages_N, self.config.clip_low, self.high)
        loss_N = found.loss_N
        metrics: Metrics = {
            "clip_ratio/low": (found.low_N.sum(), count),
            "clip_ratio/high": (found.high_N.sum(), count),
            "ratio": (log_ratio_N.detach().exp().sum(), count),
            "entropy": (-old_N.sum(), count),  # what the policy thinks of its own samples is unbiased
            **against_generator(batch, old_N),
        }
        if self.config.correction is not None:
            loss_N = loss_N * importance(batch, old_N, self.config.correction)
        if self.reference:
            reference_N = policy.reference_logps(batch)[batch.labelled_N].to(logps_N)
            kl_N = kl_to_reference(logps_N, reference_N)
            metrics["kl"] = (kl_N.detach().sum(), count)
            if not self.kl_in_reward:
                kl_N = kl_N * log_ratio_N.exp() if self.config.kl_unbiased else kl_N
                loss_N = loss_N + self.config.beta * kl_N
        if self.config.loss == "grpo":
            loss_N = loss_N / batch.labelled_S.repeat_interleave(batch.labelled_S, output_size=count)
        total = loss_N.sum()
        return Loss(total, {"loss": (total.detach(), self.weight(batch)), **metrics})


def deviation(values: np.ndarray) -> float:
    """Unbiased standard deviation; 0 of fewer than two."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
