"""Which examples each optimizer step takes, and in what order: a pure function of (seed, step)."""

from __future__ import annotations

import math

import numpy as np


def epoch_order(examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of the examples in an epoch: a pure function of (seed, epoch)."""
    if not shuffle:
        return np.arange(examples)
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(examples)


class Order:
    """The order of `examples` examples, `batch_size` of them a step. Each epoch is a fresh order; its last step holds
    what is left, so no example is dropped. Steps, epochs and examples are counted from 0."""

    def __init__(self, examples: int, *, batch_size: int, seed: int, shuffle: bool):
        self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
        self.steps_per_epoch = math.ceil(examples / batch_size)
        self._last: tuple[int, np.ndarray] | None = None  # an epoch and its order, for the steps that follow in it

    def rows(self, step: int) -> list[int]:
        """The examples of a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.batch_size
        return self._epoch(epoch)[start : start + self.batch_size].tolist()

    def step_of(self, example: int, epoch: int) -> int:
        """The step of an epoch that takes an example."""
        place = int(np.flatnonzero(self._epoch(epoch) == example)[0])
        return epoch * self.steps_per_epoch + place // self.batch_size

    def epoch_at(self, step: int) -> float:
        """Passes over the examples after `step` steps."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs + min(1.0, within * self.batch_size / self.examples)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, epoch_order(self.examples, self.seed, epoch, self.shuffle)
        return self._last[1]
