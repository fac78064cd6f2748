"""One optimizer step on this rank: gradients of its streams, the update, and the numbers that come of it.

A device is never waited for on the way: the step's weight is known from data on the host, an update that must not be is
left out by the device itself (guard.Gate), and loss, gradient norm and metrics are read when they have arrived."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tunery import guard
from tunery.data.loader import Step
from tunery.data.store import TokenStore
from tunery.engine import Numbers
from tunery.errors import NonFiniteError
from tunery.fallback import attempt, fall
from tunery.observe import observed, observes, state_of
from tunery.report import NullReport, Report
from tunery.setup import Run
from tunery.types import Batch

Metrics = dict[str, tuple[Any, Any]]
Gradients = tuple[Tensor, Metrics]  # in the parameters, and these numbers beside them


@dataclass
class Taken:
    """A step (0-based) that is done as far as the host is concerned; the device may still be at it. `numbers`: whether
    it was not finite, the gradient's norm, and each of `names`' sum and weight, on this rank."""

    step: int
    work: Step
    weight: float
    lr: float
    names: list[str]
    numbers: Numbers


def total_weight(run: Run, work: Step, interrupted: bool) -> tuple[float, bool]:
    """The whole step's weight over all ranks, known before any forward; and whether to stop after this step."""
    mine = sum(float(run.objective.weight(batch)) for batch in work.micro)
    weight, stop = run.engine.sum([mine, interrupted])
    return weight, stop > 0


def gradients(run: Run, report: Report | NullReport, step: int, work: Step, weight: float) -> Gradients:
    """The step's gradients, on ever lower rungs where memory runs out. The ranks agree on that before any gradient is
    summed, since one that fails would leave the others waiting."""
    to_observe = observes(run.objective)
    while True:
        run.engine.seed(run.job.train.seed, step)
        if to_observe:
            seen = attempt(partial(observed, run.objective, run.policy, run.model, work, run.engine))
            ran_out = run.engine.largest(0 if seen is not None else work.largest)
            if seen is None or ran_out:
                fall(run, report, ran_out, run.loader.longest or work.longest, f"in step {step + 1}")
                work = work.recut(run.cut)
                continue
            run.objective.take_in(run.engine.sum_metrics(seen))  # type: ignore[attr-defined]
            to_observe = False
        made = attempt(partial(forward_backward, run, work.micro, weight))
        ran_out = run.engine.largest(0 if made is not None else work.largest)
        if made is not None and not ran_out:
            return made
        run.optimizer.zero_grad(set_to_none=True)
        fall(run, report, ran_out, run.loader.longest or work.longest, f"in step {step + 1}")
        work = work.recut(run.cut)


def forward_backward(run: Run, micro: Sequence[Batch], weight: float) -> Gradients:
    """Gradients of (sum of the losses) / weight, whatever the cut; a step with nothing labelled gives zero. Returns the
    sum of the losses, and metrics, on the device."""
    total, sums = torch.zeros((), device=run.engine.device), Metrics()
    for batch in micro:
        loss = run.objective.loss(run.policy, batch.to(run.engine.device))
        (loss.sum / max(weight, 1e-30)).backward()
        total = total + loss.sum.detach()
        for name, (value, share) in loss.metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + share)
    return total, sums


def update(run: Run, gate: guard.Gate, step: int, work: Step, weight: float, loss: Tensor, metrics: Metrics) -> Taken:
    """Sum the gradients over ranks, clip, and update the weights unless something is not finite on any rank."""
    engine, limit = run.engine, run.job.train.max_grad_norm
    engine.sum_gradients(run.parameters)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, limit if limit is not None else math.inf)
    bad = 1.0 - (loss.isfinite() & norm.isfinite()).float()
    engine.sum_on_device(bad)  # a loss is one rank's own, and all must do the same
    gate.step(bad)
    run.optimizer.zero_grad(set_to_none=True)
    zero = torch.zeros((), dtype=torch.float64, device=engine.device)
    numbers = [gate.shut, norm, *(number for pair in metrics.values() for number in pair)]
    on_device = torch.stack([zero + number for number in numbers])  # whatever they are: plain, or scalars of any dtype
    lr = run.optimizer.param_groups[0]["lr"]
    return Taken(step, work, weight, lr, list(metrics), Numbers(on_device))


def settle(run: Run, report: Report | NullReport, taken: Taken) -> None:
    """Read and report a step's numbers. Raises NonFiniteError, with the weights as they were before that step."""
    shut, norm, *values = taken.numbers.read()
    if shut:
        _fail(run, taken)
    metrics = run.engine.sum_metrics(dict(zip(taken.names, zip(values[::2], values[1::2], strict=True), strict=True)))
    value, share = metrics.get("loss", (0.0, 0.0))
    report.step(
        taken.step + 1, loss=value / share if share else 0.0, weight=taken.weight, lr=taken.lr, grad_norm=norm,
        tokens=taken.work.tokens, examples=len(taken.work.rows), epoch=run.loader.epoch_at(taken.step + 1),
        metrics=metrics, memory_bytes=run.engine.memory(),
    )  # fmt: skip


def _fail(run: Run, taken: Taken) -> None:
    """Say what was not finite and keep what replays it."""
    run.optimizer.zero_grad(set_to_none=True)
    step, seed, engine = taken.step, run.job.train.seed, run.engine
    streams = taken.work.recut(run.cut).micro
    micro = [batch.to(engine.device) for batch in streams]
    findings = guard.investigate(run.model, run.objective, run.policy, micro, lambda: engine.seed(seed, step))
    everyone = engine.gather((findings, [guard.as_dict(batch) for batch in streams]))
    findings = [finding for found, _ in everyone for finding in found]
    origins = {row: origin(run, row) for finding in findings for row in finding.rows}
    folder = run.output / f"failure-step-{step + 1}"
    if engine.is_main:
        guard.keep_failure(folder, step, everyone, origins, state_of(run.objective))
        run.save_weights(folder)
    raise NonFiniteError(guard.explain(step + 1, findings, origins, run.output))


def origin(run: Run, row: int) -> str:
    """file:row of a training example, for messages."""
    if isinstance(run.data.train, TokenStore):
        file, number = run.data.train.origin(row)
        return f"{file}:{number}"
    return f"streamed example {row + 1}"
