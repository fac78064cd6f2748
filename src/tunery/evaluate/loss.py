"""Evaluation by the objective itself: exact means over held-out rows, weighted by tokens, never by batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tunery.engine import Engine
from tunery.types import Batch, Objective, Policy


def evaluate(
    objective: Objective, policy: Policy, model: torch.nn.Module, streams: Iterable[Batch], engine: Engine
) -> dict[str, float]:
    """Each of the objective's metrics over all streams of all ranks: sum of sums / sum of weights."""
    was_training = model.training
    model.eval()
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for batch in streams:
            batch = batch.to(engine.device)
            for name, (value, weight) in objective.loss(policy, batch).metrics.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += float(value)
                total[1] += float(weight)
    model.train(was_training)
    names = sorted(totals) or ["loss"]
    summed = engine.sum(torch.tensor([totals.get(name, [0.0, 0.0]) for name in names]))
    return {name: float(s / w) if w else float("nan") for name, (s, w) in zip(names, summed.tolist(), strict=True)}
