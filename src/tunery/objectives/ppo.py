"""Proximal policy optimization: a value learned beside the policy says what was to be expected of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.objectives._clipping import Metrics, against_generator, clipped, importance, old_logps
from tunery.objectives._generated import places, prompt_rows, put
from tunery.types import Batch, Example, Loss, Policy, Refused, Sample, Tokens

TINY = 1e-8  # added to a variance or a deviation before dividing by it
KL_ERROR = 0.2  # largest share by which the distance may seem to be off its target


class Config(KindConfig):
    kind: str = "ppo"
    clip_low: float = Field(0.2, gt=0, description="the ratio is clipped below 1 - this")
    clip_high: float | None = Field(None, gt=0, description="and above 1 + this; null: as clip_low")
    value: Literal["shared", "separate"] = Field(
        "shared",
        description="a head on the policy's own hidden states; separate: an adapter of its own on the same base, for "
        "adapter: lora",
    )
    value_weight: float = Field(0.1, ge=0, description="weight of the value's loss")
    value_clip: float | None = Field(
        0.2, gt=0, description="the value is clipped so far from what it was when the rollout was made; null: not"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later rewards, a token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="1: what was got; 0: the value one token on")
    beta: float = Field(0.05, ge=0, description="weight of the KL divergence from where training began, in the reward")
    kl_target: float | None = Field(
        None, gt=0, description="adapt beta to keep this divergence of an answer, in nats (6 is usual); null: fixed"
    )
    kl_horizon: float = Field(10000, gt=0, description="answers over which an adapted beta moves by its own size")
    score_norm: bool = Field(False, description="normalise rewards by the mean and deviation of all so far")
    score_clip: float | None = Field(None, gt=0, description="rewards are clipped to this and its negative; null: not")
    whiten_rewards: bool = Field(False, description="divide the tokens' rewards by their deviation in the rollout")
    whiten_advantages: bool = Field(True, description="advantages of the rollout get mean 0 and variance 1")
    correction: float | None = Field(
        None, gt=0, description="weigh by engine over generator probability, at most this (2 is usual); null: not"
    )

    @model_validator(mode="after")
    def _honest(self) -> Config:
        if self.kl_target is not None and self.beta == 0:
            raise ValueError("kl_target adapts beta by its own size, so beta must be above 0 to begin with")
        return self


class Objective:
    """PPO for language models (Schulman et al., arXiv:1707.06347, eq. 7; Ouyang et al., arXiv:2203.02155, eq. 2 without
    its pretraining term). Of an answer's tokens t = 1..n, sampled by p_old, with the answer's reward R:

        r_t   = -beta log(p_old_t / p_ref_t), and R more for the last        Ziegler et al., arXiv:1909.08593, eq. 2
        A_t   = sum_k (gamma lambda)^k d_{t+k}, d_t = r_t + gamma V_{t+1} - V_t, V_{n+1} = 0   arXiv:1506.02438, eq. 16
        G_t   = A_t + V_t
        L     = sum_t max(-r A_t, -clip(r, 1 - low, 1 + high) A_t)
                + value_weight / 2 max((v_t - G_t)^2, (clip(v_t, V_t - c, V_t + c) - G_t)^2)

    r is the ratio of a token's probability now to p_old, v_t the value now, V_t that when the rollout was made. The
    loss is a mean over the tokens of the step; in it A_t has mean 0 and variance 1 over the rollout's tokens
    (`whiten_advantages`). An answer that was cut off counts as ended.

    The value is a linear head on the policy's last hidden states (`value_head`), at the position that predicts the
    token: one forward gives both, and the backbone's trained weights learn from both losses. With `value: separate` the
    head is on those of a second adapter on the same base (`critic`): two forwards, and no loss reaches both.

    All statistics (of whitening, of rewards, of the divergence) are those of whole rollouts, taken before it is cut.
    With `kl_target`, after each rollout beta is multiplied by 1 + clip(KL / target - 1, -0.2, 0.2) answers / horizon
    (arXiv:1909.08593, section 2.2; answers / horizon counts as 1 where it is more, or a large rollout could turn beta's
    sign). An answer that no reward applies to is left out."""

    generates = True
    value_head = True

    def __init__(self, config: Config):
        self.config = config
        self.reference = config.beta > 0
        self.critic = config.value == "separate"
        self.high = config.clip_low if config.clip_high is None else config.clip_high
        self.beta = config.beta
        self.scores = Moments()

    # ------------------------------------------------------------ prompts, and what becomes of their answers

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return prompt_rows(examples, template)

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """The policy's log-probabilities and values as they are, and the reference's log-probabilities, [T] each."""
        logps_T, values_T = policy.logps_and_values(batch)
        found = {"old_logps": logps_T, "values": values_T}
        return found | {"reference_logps": policy.reference_logps(batch)} if self.reference else found

    def judge(self, groups: Sequence[Sequence[Sample]]) -> Metrics:
        """`advantages` and `returns` of each token, from all rewards of the rollout. Moves beta."""
        samples = [sample for group in groups for sample in group]
        judged = [sample for sample in samples if sample.reward is not None and len(places(sample.tokens))]
        for sample in samples:
            put(sample.tokens, "advantages", 0.0)
            put(sample.tokens, "returns", 0.0)
            if sample.reward is None:
                sample.tokens.weights[:] = 0.0
        if not judged:
            return {}
        config, ends = self.config, np.cumsum([len(places(sample.tokens)) for sample in judged])
        values_N = _of(judged, "values")
        kl_N = _of(judged, "old_logps") - _of(judged, "reference_logps") if self.reference else np.zeros(ends[-1])
        rewards_N = -self.beta * kl_N
        rewards_N[ends - 1] += self._scaled(np.array([sample.reward for sample in judged], dtype=np.float64))
        if config.whiten_rewards:
            rewards_N = whiten(rewards_N, shift=False)
        parts = zip(np.split(rewards_N, ends[:-1]), np.split(values_N, ends[:-1]), strict=True)
        advantages_N = np.concatenate([gae(r, v, config.gamma, config.gae_lambda) for r, v in parts])
        returns_N = advantages_N + values_N
        if config.whiten_advantages:
            advantages_N = whiten(advantages_N)
        for number, sample in enumerate(judged):
            mine = slice(ends[number - 1] if number else 0, ends[number])
            put(sample.tokens, "advantages", advantages_N[mine])
            put(sample.tokens, "returns", returns_N[mine])
        return self._figures(kl_N, values_N, returns_N, len(judged))

    def _scaled(self, scores_S: np.ndarray) -> np.ndarray:
        if self.config.score_norm:
            self.scores.add(scores_S)
            scores_S = (scores_S - self.scores.mean) / (self.scores.deviation + TINY)
        limit = self.config.score_clip
        return scores_S if limit is None else scores_S.clip(-limit, limit)

    def _figures(self, kl_N: np.ndarray, values_N: np.ndarray, returns_N: np.ndarray, answers: int) -> Metrics:
        """What the rollout comes to; and beta for the next one."""
        tokens, spread = float(len(kl_N)), float(returns_N.var())
        found: Metrics = {
            "returns/mean": (float(returns_N.sum()), tokens),
            "values/mean": (float(values_N.sum()), tokens),
            "explained_variance": (1 - float((returns_N - values_N).var()) / spread if spread else 0.0, 1.0),
        }
        if self.reference:
            total = float(kl_N.sum())
            found |= {"kl": (total, tokens), "kl/answer": (total, answers), "beta": (self.beta, 1.0)}
            if self.config.kl_target is not None:
                error = min(KL_ERROR, max(-KL_ERROR, total / answers / self.config.kl_target - 1))
                self.beta *= 1 + error * min(1.0, answers / self.config.kl_horizon)
        return found

    # ------------------------------------------------------------ the loss

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config, rows = self.config, batch.labelled_N
        logps_N, values_N = (x_T[rows] for x_T in policy.logps_and_values(batch))
        old_N, count = old_logps(batch, logps_N), len(logps_N)
        # a plan looks at shapes alone, and its streams have no advantages
        advantages_N, returns_N, before_N = (
            batch.extra.get(name, batch.weights_T)[rows].to(logps_N) for name in ("advantages", "returns", "values")
        )
        found = clipped(logps_N - old_N, advantages_N, config.clip_low, self.high)
        policy_N = found.loss_N
        if config.correction is not None:
            policy_N = policy_N * importance(batch, old_N, config.correction)
        value_N, beyond_N = value_losses(values_N, returns_N, before_N, config.value_clip)
        total = policy_N.sum() + config.value_weight * value_N.sum()
        with torch.no_grad():
            log_ratio_N = logps_N - old_N
            sums = {
                "policy_loss": policy_N,
                "value_loss": value_N,
                "clip_ratio/low": found.low_N,
                "clip_ratio/high": found.high_N,
                "clip_ratio/value": beyond_N,
                "ratio": log_ratio_N.exp(),
                "approx_kl": log_ratio_N.square() / 2,
                "entropy": -old_N,  # what the policy thinks of its own samples is unbiased
            }
            metrics: Metrics = {name: (value.sum(), count) for name, value in sums.items()}
        return Loss(total, {"loss": (total.detach(), self.weight(batch)), **metrics, **against_generator(batch, old_N)})

    # ------------------------------------------------------------ from rollout to rollout

    def state(self) -> dict[str, Any]:
        """beta, and the moments of all rewards so far."""
        return {"beta": self.beta, "scores": [self.scores.count, self.scores.mean, self.scores.squares]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.beta, self.scores = state["beta"], Moments(*state["scores"])


class Moments:
    """Count, mean and sum of squared deviations of all numbers seen (Chan et al., 1979)."""

    def __init__(self, count: int = 0, mean: float = 0.0, squares: float = 0.0):
        self.count, self.mean, self.squares = count, mean, squares

    @property
    def deviation(self) -> float:
        """Unbiased; 0 of fewer than two."""
        return (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def add(self, values: np.ndarray) -> None:
        count, apart = self.count + len(values), float(values.mean()) - self.mean
        self.squares += float(((values - values.mean()) ** 2).sum()) + apart**2 * self.count * len(values) / count
        self.mean += apart * len(values) / count
        self.count = count


def gae(rewards_n: np.ndarray, values_n: np.ndarray, gamma: float, decay: float) -> np.ndarray:
    """Generalised advantage estimates of one answer's tokens, [n] (Schulman et al., arXiv:1506.02438, eq. 16); after
    the last token nothing is to be had."""
    errors_n = rewards_n + gamma * np.append(values_n[1:], 0.0) - values_n
    advantages_n, later = np.empty_like(errors_n), 0.0
    for t in reversed(range(len(errors_n))):
        advantages_n[t] = later = errors_n[t] + gamma * decay * later
    return advantages_n


def whiten(values_N: np.ndarray, shift: bool = True) -> np.ndarray:
    """Divided by the unbiased deviation, and with mean 0 (`shift`) or as it was."""
    mean = values_N.mean()
    spread = float(values_N.var(ddof=1)) if len(values_N) > 1 else 0.0
    return (values_N - mean) / (spread + TINY) ** 0.5 + (0.0 if shift else mean)


def value_losses(values_N: Tensor, returns_N: Tensor, before_N: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error, or that of the clipped value where it is larger; and where it is (0 or 1). [N] each."""
    squares_N = (values_N - returns_N).square()
    if clip is None:
        return squares_N / 2, torch.zeros_like(squares_N)
    bounded_N = (before_N + (values_N - before_N).clamp(-clip, clip) - returns_N).square()
    return torch.maximum(squares_N, bounded_N) / 2, (bounded_N > squares_N).to(squares_N.dtype)


def _of(samples: Sequence[Sample], name: str) -> np.ndarray:
    """A value of all their trained tokens, one after the other, float64 [N]."""
    return np.concatenate([sample.tokens.extra[name][places(sample.tokens)] for sample in samples]).astype(np.float64)
