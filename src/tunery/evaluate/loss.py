"""Evaluation by the objective itself: exact means over held-out rows, weighted by tokens, never by batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tunery.data.loader import Cut, Step
from tunery.engine import Engine
from tunery.errors import OutOfMemoryError
from tunery.fallback import attempt
from tunery.observe import observed, observes
from tunery.types import Objective, Policy

Sums = dict[str, tuple[Any, Any]]


def evaluate(
    objective: Objective, policy: Policy, model: torch.nn.Module, steps: Iterable[Step], engine: Engine,
    on_fall: Callable[[Cut], None] = lambda _: None,
) -> dict[str, float]:  # fmt: skip
    """Each of the objective's metrics over all examples of `steps` (the same on every rank), of which each rank has its
    share of streams: sum of sums / sum of weights. Where memory runs out on any rank, streams are cut smaller, for this
    step and all that follow, which changes nothing; `on_fall` is told how. Raises OutOfMemoryError where a single
    example is too much."""
    was_training = model.training
    model.eval()
    totals, how = Sums(), None
    for step in steps:
        work = step if how is None else step.recut(how)
        if observes(objective, training=False):
            seen, work = _cut_to_fit(
                lambda work: observed(objective, policy, model, work, engine), work, engine, on_fall
            )
            objective.take_in(engine.sum_metrics(seen))  # type: ignore[attr-defined]
        made, work = _cut_to_fit(partial(_sums, objective, policy, engine), work, engine, on_fall)
        _add(totals, made)
        how = work.how
    model.train(was_training)
    summed = engine.sum_metrics({name: (float(value), float(weight)) for name, (value, weight) in totals.items()})
    return {name: value / weight if weight else float("nan") for name, (value, weight) in summed.items()}


def _cut_to_fit(
    make: Callable[[Step], Sums], work: Step, engine: Engine, on_fall: Callable[[Cut], None]
) -> tuple[Sums, Step]:
    """What `make` makes of a step, and the step as it was cut for that, the same on every rank."""
    while True:
        made = attempt(partial(make, work))
        ran_out = engine.largest(0 if made is not None else work.largest)
        if made is not None and not ran_out:
            return made, work
        how = _smaller(work.how, ran_out, work.longest)
        on_fall(how)
        work = work.recut(how)


@torch.no_grad()
def _sums(objective: Objective, policy: Policy, engine: Engine, step: Step) -> Sums:
    """Over this rank's streams of a step, on the device: they are read once at the end, not at each stream."""
    sums, zero = Sums(), torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in step.micro:
        metrics = objective.loss(policy, batch.to(engine.device)).metrics
        _add(sums, {name: (zero + value, zero + weight) for name, (value, weight) in metrics.items()})
    return sums


def _add(sums: Sums, more: Sums) -> None:
    for name, (value, weight) in more.items():
        before = sums.get(name)
        sums[name] = (value, weight) if before is None else (before[0] + value, before[1] + weight)


def _smaller(how: Cut, stream: int, longest: int) -> Cut:
    """After memory ran out on a stream of so many tokens (the largest of any rank's); `longest`: of one example."""
    size = min(how.budget, stream)
    if how.packing and size > longest:
        return replace(how, budget=max(longest, size // 2))
    raise OutOfMemoryError(
        f"memory ran out in an evaluation, on a stream of {stream:,} tokens, and no example can be cut (the longest "
        f"has {longest:,}). Lower data.max_length, leave out data.eval, or take a smaller model or a device with more "
        "memory"
    )
