"""Every reward of a run on every answer, and their weighted sum."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from tunery.config import build, load_kind
from tunery.errors import RewardError, TuneryError
from tunery.rewards import Host, RewardConfig
from tunery.rollout.sandbox import SandboxedReward
from tunery.types import Answer, Sample


class Rewards:
    """The rewards of `configs`, by name; a second one of a name gets a number."""

    def __init__(self, configs: Sequence[Any]):
        self.weights: dict[str, float] = {}
        self._rewards: dict[str, Any] = {}
        self._checked: dict[str, Any] = {}
        for config in configs:
            name = _free(_name(config), self._rewards)
            kind = load_kind("rewards", config.kind).Reward
            self._rewards[name] = (
                SandboxedReward(config, name) if getattr(kind, "sandboxed", False) else build("rewards", config)
            )
            if hasattr(kind, "check"):
                self._checked[name] = build("rewards", config)
            self.weights[name] = config.weight

    def start(self) -> None:
        """Make the processes of sandboxed rewards, so that what cannot be used is said before anything is generated.
        Raises ConfigError."""
        for reward in self._rewards.values():
            if isinstance(reward, SandboxedReward):
                reward.start()

    def load(self, host: Host) -> list[str]:
        """Load what is large, beside the policy; what is to be said of it. Raises ModelError."""
        notes: list[str] = []
        for name, reward in self._rewards.items():
            if hasattr(reward, "load"):
                notes += [f"rewards: {name} {note}" for note in reward.load(host)]
        return notes

    def check(self, answers: Sequence[Answer]) -> None:
        """Raises RewardError for rows that a reward could never score."""
        for name, reward in self._checked.items():
            try:
                reward.check(answers)
            except RewardError as error:
                raise RewardError(f"rewards: {name}: {error}") from None

    def score(self, samples: Sequence[Sample]) -> None:
        """Fill in `rewards` and `reward` of each sample. Raises RewardError naming the row where a reward fails, or
        gives what is not a finite number."""
        if not samples:
            return
        answers = [sample.answer for sample in samples]
        for name, reward in self._rewards.items():
            scores = _scores(reward, name, answers)
            for sample, score in zip(samples, scores, strict=True):
                if score is not None and not math.isfinite(score):
                    raise RewardError(
                        f"rewards: {name} gave {score} for an answer to {sample.answer.where}: "
                        f"{sample.answer.text[:200]!r}; a reward is a finite number, or None where it does not apply"
                    )
                sample.rewards[name] = score
        for sample in samples:
            there = [self.weights[name] * score for name, score in sample.rewards.items() if score is not None]
            sample.reward = math.fsum(there) if there else None

    def close(self) -> None:
        """End the processes."""
        for reward in self._rewards.values():
            if isinstance(reward, SandboxedReward):
                reward.close()


def _scores(reward: Any, name: str, answers: Sequence[Answer]) -> list[float | None]:
    """Those of a reward in this process, whose kind may be the user's code: whatever it does is one error, which all
    ranks raise. (The sandbox has seen to this for those that run there.)"""
    try:
        scores = reward.score(answers)
    except TuneryError:
        raise
    except Exception as error:
        rows = f"{answers[0].where} to {answers[-1].where}"
        raise RewardError(
            f"rewards: {name} failed on the answers to {rows}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, list | tuple) or len(scores) != len(answers):
        what = f"{len(scores)} values" if isinstance(scores, list | tuple) else type(scores).__name__
        raise RewardError(f"rewards: {name} gave {what}, expected a list with one number for each of {len(answers)}")
    wrong = next((i for i, s in enumerate(scores) if s is not None and not isinstance(s, numbers.Real)), None)
    if wrong is not None:
        raise RewardError(
            f"rewards: {name} gave {scores[wrong]!r} for an answer to {answers[wrong].where}, which is no number"
        )
    return [None if score is None else float(score) for score in scores]


def _name(config: RewardConfig) -> str:
    if config.name is not None:
        return config.name
    name_of = getattr(load_kind("rewards", config.kind), "name_of", None)
    return name_of(config) if name_of is not None else config.kind.rpartition(".")[2]


def _free(name: str, taken: Any) -> str:
    number = next(n for n in range(1, len(taken) + 2) if (name if n == 1 else f"{name}-{n}") not in taken)
    return name if number == 1 else f"{name}-{number}"
