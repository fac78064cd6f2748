"""Probability ratios and what is made of them, on the trained tokens of a stream.

Suffixes: N trained tokens, S sequences (in the order of the tokens)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunery.types import Batch

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]


def old_logps(batch: Batch, logps_N: Tensor) -> Tensor:
    """Log-probabilities by the policy that generated, as the engine computes them: measured when the rollout was made,
    or, where it is trained on once and the policy is still that one, the present ones. [N], no gradient."""
    kept = batch.extra.get("old_logps")
    return logps_N.detach() if kept is None else kept[batch.labelled_N].to(logps_N)


def of_sequences(values_N: Tensor, batch: Batch) -> Tensor:
    """Means over each sequence's tokens, given to each of them: [N]."""
    sums_S = torch.segment_reduce(values_N, "sum", lengths=batch.labelled_S, unsafe=True)
    means_S = sums_S / batch.labelled_S.clamp(min=1)
    return means_S.repeat_interleave(batch.labelled_S, output_size=len(values_N))


@dataclass
class Clipped:
    """`loss_N`, and where the clipping has taken the gradient away, `low_N` and `high_N` (0 or 1)."""

    loss_N: Tensor
    low_N: Tensor
    high_N: Tensor


def clipped(log_ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A), with r the ratio of probabilities (Schulman et al., arXiv:1707.06347,
    eq. 7, with two bounds as in DAPO, arXiv:2503.14476, eq. 10)."""
    ratio_N = log_ratio_N.exp()
    bounded_N = ratio_N.clamp(1 - low, 1 + high)
    loss_N = -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    with torch.no_grad():
        low_N = ((ratio_N < 1 - low) & (advantages_N < 0)).to(loss_N.dtype)
        high_N = ((ratio_N > 1 + high) & (advantages_N > 0)).to(loss_N.dtype)
    return Clipped(loss_N, low_N, high_N)


def kl_to_reference(logps_N: Tensor, reference_N: Tensor) -> Tensor:
    """The estimator k3 = p_ref / p - log(p_ref / p) - 1 of KL(policy, reference): unbiased, and never below 0
    (Schulman, "Approximating KL divergence", 2020; arXiv:2402.03300, eq. 4). [N]"""
    log_ratio_N = reference_N - logps_N
    return log_ratio_N.exp() - log_ratio_N - 1


def against_generator(batch: Batch, old_N: Tensor) -> Metrics:
    """How far the engine's log-probabilities are from the generator's, for the very same weights: the mean absolute
    difference, and k3 of KL(generator, engine)."""
    generated = batch.extra.get("generated_logps")
    if generated is None:
        return {}
    count = len(old_N)
    difference_N = old_N - generated[batch.labelled_N].to(old_N)
    kl_N = difference_N.exp() - difference_N - 1
    return {"rollout/difference": (difference_N.abs().sum(), count), "rollout/kl": (kl_N.sum(), count)}


def importance(batch: Batch, old_N: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of the engine's policy over the generator's, min(p / p_generator, cap) (Yao et al.,
    "Your efficient RL framework secretly brings you off-policy training", 2025). [N], no gradient."""
    return (old_N - batch.extra["generated_logps"][batch.labelled_N].to(old_N)).exp().clamp(max=cap)
