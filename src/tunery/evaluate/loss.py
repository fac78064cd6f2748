"""Evaluation by the objective itself: exact means over held-out rows, weighted by tokens, never by batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tunery.engine import Engine
from tunery.types import Batch, Objective, Policy


def evaluate(
    objective: Objective, policy: Policy, model: torch.nn.Module, streams: Iterable[Batch], engine: Engine
) -> dict[str, float]:
    """Each of the objective's metrics over all streams of all ranks: sum of sums / sum of weights."""
    was_training = model.training
    model.eval()
    totals: dict[str, tuple[Any, Any]] = {}
    zero = torch.zeros((), dtype=torch.float64, device=engine.device)  # read once at the end, not at each stream
    with torch.no_grad():
        for batch in streams:
            for name, (value, weight) in objective.loss(policy, batch.to(engine.device)).metrics.items():
                before = totals.get(name, (zero, zero))
                totals[name] = (before[0] + value, before[1] + weight)
    model.train(was_training)
    summed = engine.sum_metrics({name: (float(value), float(weight)) for name, (value, weight) in totals.items()})
    return {name: value / weight if weight else float("nan") for name, (value, weight) in summed.items()}
