"""The plan of a run: every number a person may want before it starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tunery.checkpoint import save_interval
from tunery.plan.choose import best, rungs_of
from tunery.plan.ladder import Change, ladder
from tunery.plan.planner import Memory, Planner
from tunery.plan.reference import reference_cost
from tunery.plan.work import AssumedRows, Work


@dataclass
class Plan:
    """Sizes in bytes, times in seconds. `flops_per_token` are the useful ones (flops.py). `tokens` of the whole run;
    None where the end of the data is not known. `times` says what the times are: an "estimate" from the device's rates,
    or that "corrected" by real steps."""

    model: str
    adapter: str
    device: str
    device_memory: int
    ranks: int
    dtype: str
    parameters: int
    trainable: int
    micro_tokens: int
    checkpointing: str
    memory: Memory
    fits: bool
    flops_per_token: float
    executed_flops_per_token: float
    tokens_per_second: float
    seconds_per_step: float
    steps: int | None
    tokens: int | None
    seconds: float | None
    disk: int
    times: str = "estimate"
    ladder: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


@dataclass(frozen=True)
class Measured:
    """Real steps: tokens of each stream of each step, seconds of each step, and bytes at the worst moment, with what
    the device's allocator and libraries hold (on a CPU the whole process)."""

    streams: list[list[int]]
    seconds: list[float]
    peak: int


def make_plan(planner: Planner) -> Plan:
    """The plan of the planner's job on its device."""
    job, device, rows = planner.job, planner.device, planner.rows
    rungs = rungs_of(job, device)
    micro_tokens, rung = best(planner, rungs)
    memory, work = planner.memory(micro_tokens, rung), planner.work(micro_tokens)
    seconds, once, disk = planner.seconds(micro_tokens, rung), 0.0, _disk(planner, work)
    notes = []
    reference = reference_cost(planner, micro_tokens, rung)
    if reference is not None:
        memory = replace(memory, weights=memory.weights + reference.memory)
        seconds, once, disk = seconds + reference.each_step, reference.once, disk + reference.disk
        notes.append(reference.note)
    fits = memory.total <= device.memory
    if isinstance(rows, AssumedRows) and not job.rewards:  # answers to come are another matter (plan/command.py)
        notes.append(
            f"the rows are not read: each is taken to be {job.data.max_length} tokens (data.max_length), all trained on"
        )
    if planner.note:
        notes.append(planner.note)
    return Plan(
        model=job.model.name,
        adapter=job.adapter.kind,
        device=device.name,
        device_memory=device.memory,
        ranks=planner.world,
        dtype=str(planner.dtype).removeprefix("torch."),
        parameters=planner.shadow.parameters,
        trainable=planner.shadow.trainable,
        micro_tokens=micro_tokens,
        checkpointing=rung,
        memory=memory,
        fits=fits,
        flops_per_token=planner.flops_per_token,
        executed_flops_per_token=planner.executed_flops(micro_tokens, rung),
        tokens_per_second=work.tokens / seconds,
        seconds_per_step=seconds,
        steps=work.steps,
        tokens=None if work.steps is None else round(work.tokens * work.steps),
        seconds=None if work.steps is None else seconds * work.steps + once,
        disk=disk,
        ladder=[] if fits and (micro_tokens, rung) == (planner.most, rungs[0]) else ladder(planner),
        notes=notes,
    )


def corrected(plan: Plan, planner: Planner, measured: Measured) -> Plan:
    """The plan with its times scaled to those of real steps (the first of them, which warms up, apart), and with the
    overhead that was there."""
    line = planner.line(plan.checkpointing)
    expected = [planner.step_seconds(streams, plan.checkpointing) for streams in measured.streams]
    skip = 1 if len(expected) > 1 else 0
    factor = sum(measured.seconds[skip:]) / sum(expected[skip:])
    largest = max(tokens for streams in measured.streams for tokens in streams)
    tensors = plan.memory.weights + plan.memory.optimizer + line.memory(largest)
    memory = replace(plan.memory, overhead=max(0, measured.peak - tensors))
    note = f"corrected by {len(expected)} real steps: time x {factor:.2f} of what was expected"
    return replace(
        plan,
        memory=memory,
        fits=memory.total <= plan.device_memory,
        tokens_per_second=plan.tokens_per_second / factor,
        seconds_per_step=plan.seconds_per_step * factor,
        seconds=None if plan.seconds is None else plan.seconds * factor,
        times="corrected",
        notes=[*plan.notes, note],
    )


def _disk(planner: Planner, work: Work) -> int:
    """Checkpoints kept and the result: weights of what is saved, and the optimizer's states."""
    job, shadow = planner.job, planner.shadow
    weights = shadow.weight_bytes if shadow.whole else shadow.gradient_bytes
    written = 1
    if work.steps is not None:
        written = math.ceil(work.steps / save_interval(job.train.save_every, work.steps_per_epoch, work.steps))
    best = job.eval.best and job.data.eval is not None  # which is kept besides
    kept = written if job.train.keep is None else min(written, job.train.keep + best)
    return kept * (weights + planner.optimizer[0]) + weights
