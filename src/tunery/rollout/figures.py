"""What a rollout's rewards and answers come to, as (sum, weight) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tunery.types import Sample

Figures = dict[str, tuple[float, float]]
SAME = 1e-8  # rewards closer than this are equal


def figures_of(groups: Sequence[Sequence[Sample]]) -> Figures:
    """The answers' mean length in tokens and the share that was cut off; and where there are rewards their mean, its
    deviation within groups, each reward's mean and deviation, and the share of groups whose answers are all worth the
    same."""
    samples = [sample for group in groups for sample in group]
    figures = scores_of(samples)
    if figures:
        judged = [_rewards(group) for group in groups]
        figures["reward_std"] = _mean([float(r.std(ddof=1)) for r in judged if len(r) > 1])
        figures["frac_reward_zero_std"] = _mean([float(is_equal(group)) for group in groups if len(group) > 1])
    figures["completions/mean_length"] = _mean([float(len(s.answer.ids)) for s in samples])
    figures["completions/clipped_ratio"] = _mean([float(s.answer.finish == "length") for s in samples])
    return figures


def scores_of(samples: Sequence[Sample]) -> Figures:
    """The mean of the rewards' sum, and each reward's mean and deviation; nothing where no reward was asked."""
    if not any(sample.rewards for sample in samples):
        return {}
    figures = {"reward": _mean([s.reward for s in samples if s.reward is not None])}
    for name in dict.fromkeys(name for sample in samples for name in sample.rewards):
        values = np.array([s.rewards[name] for s in samples if s.rewards[name] is not None], dtype=np.float64)
        figures[f"rewards/{name}/mean"] = _mean(values)
        if len(values) > 1:
            figures[f"rewards/{name}/std"] = (float(values.std(ddof=1)) * len(values), float(len(values)))
    return figures


def is_equal(group: Sequence[Sample]) -> bool:
    """Whether a group's answers are all worth the same, so that none can be preferred."""
    rewards = _rewards(group)
    return len(rewards) < 2 or float(rewards.max() - rewards.min()) < SAME


def _rewards(group: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.reward for sample in group if sample.reward is not None], dtype=np.float64)


def _mean(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return float(np.sum(values)) if values else 0.0, float(len(values))
