"""Evaluation by the objective itself: exact means over held-out rows, weighted by tokens, never by batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tunery.data.loader import Step
from tunery.engine import Engine
from tunery.observe import observed, observes
from tunery.types import Objective, Policy


def evaluate(
    objective: Objective, policy: Policy, model: torch.nn.Module, steps: Iterable[Step], engine: Engine
) -> dict[str, float]:
    """Each of the objective's metrics over all examples of `steps` (the same on every rank), of which each rank has its
    share of streams: sum of sums / sum of weights."""
    was_training = model.training
    model.eval()
    totals: dict[str, tuple[Any, Any]] = {}
    zero = torch.zeros((), dtype=torch.float64, device=engine.device)  # read once at the end, not at each stream
    with torch.no_grad():
        for step in steps:
            if observes(objective):
                seen = engine.sum_metrics(observed(objective, policy, model, step, engine))
                objective.take_in(seen, training=False)  # type: ignore[attr-defined]
            for batch in step.micro:
                for name, (value, weight) in objective.loss(policy, batch.to(engine.device)).metrics.items():
                    before = totals.get(name, (zero, zero))
                    totals[name] = (before[0] + value, before[1] + weight)
    model.train(was_training)
    summed = engine.sum_metrics({name: (float(value), float(weight)) for name, (value, weight) in totals.items()})
    return {name: value / weight if weight else float("nan") for name, (value, weight) in summed.items()}
