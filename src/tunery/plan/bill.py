"""The plan of a run: every number a person may want before it starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tunery.checkpoint import save_interval
from tunery.plan.choose import best, rungs_of
from tunery.plan.frozen_states import frozen_states
from tunery.plan.ladder import Change, ladder
from tunery.plan.planner import Memory, Planner
from tunery.plan.reference import reference_cost, teacher_seconds
from tunery.plan.work import AssumedRows, Work
from tunery.progress import human


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
    the device's allocator and libraries hold (on a CPU the whole process). `fell_to`: train.micro_tokens and
    train.checkpointing where memory ran out on what the plan had; the steps are those after that."""

    streams: list[list[int]]
    seconds: list[float]
    peak: int
    fell_to: tuple[int, str] | None = None


def make_plan(planner: Planner, cut: tuple[int, str] | None = None) -> Plan:
    """The plan of the planner's job on its device; with a `cut` (train.micro_tokens, train.checkpointing) instead of
    the fastest that fits, where one is given."""
    job, device, rows = planner.job, planner.device, planner.rows
    micro_tokens, rung = cut or best(planner, rungs_of(job, device))
    memory, work = planner.memory(micro_tokens, rung), planner.work(micro_tokens)
    beside = _beside(planner, micro_tokens, rung)
    memory = replace(memory, weights=memory.weights + beside.memory)
    seconds, notes = planner.seconds(micro_tokens, rung) + beside.each_step, beside.notes
    fits = max(memory.total, _awake(planner, memory)) <= device.memory
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
        flops_per_token=planner.flops_per_token * beside.useful,
        executed_flops_per_token=beside.executed or planner.executed_flops(micro_tokens, rung),
        tokens_per_second=work.tokens / seconds,
        seconds_per_step=seconds,
        steps=work.steps,
        tokens=None if work.steps is None else round(work.tokens * work.steps),
        seconds=None if work.steps is None else seconds * work.steps + beside.once,
        disk=_disk(planner, work) + beside.disk,
        ladder=_ladder(planner, fits, micro_tokens, rung),
        notes=notes,
    )


@dataclass
class Beside:
    """What a run takes besides its steps: `memory` and `disk` in bytes, `each_step` and `once` in seconds. `useful`:
    the share of its useful arithmetic that is left to do, and `executed` FLOPs of a token where that changes them."""

    memory: int = 0
    disk: int = 0
    each_step: float = 0.0
    once: float = 0.0
    useful: float = 1.0
    executed: float | None = None
    notes: list[str] = field(default_factory=list)


def _beside(planner: Planner, micro_tokens: int, rung: str) -> Beside:
    """Of a reference or a teacher, and of frozen layers that run once."""
    beside = Beside()
    reference = reference_cost(planner, micro_tokens, rung)
    if reference is not None:
        beside.memory, beside.disk, beside.once = reference.memory, reference.disk, reference.once
        beside.each_step += reference.each_step
        beside.notes.append(reference.note)
    if planner.shadow.teacher_bytes:
        seconds = teacher_seconds(planner, micro_tokens, rung)
        beside.each_step += seconds
        beside.notes.append(
            f"the teacher's weights take {human(planner.shadow.teacher_bytes)}B, and its forward about {seconds:.2g} s "
            "of each step (by its size)"
        )
    if planner.models > 1:
        beside.notes.append("the value's own adapter trains beside the policy's, and is taken to need as much as that")
    if planner.shadow.reward_bytes:
        beside.notes.append(f"the reward models take {human(planner.shadow.reward_bytes)}B of memory beside the policy")
    kept = frozen_states(planner, micro_tokens, rung)
    if isinstance(kept, str):
        beside.notes.append(f"every epoch runs the frozen layers, because {kept} (adapter.cache)")
    elif kept is not None:
        beside.disk += kept.disk
        beside.each_step += kept.each_step
        beside.useful, beside.executed = 1 - kept.saved, kept.executed
        beside.notes.append(kept.note)
    return beside


def _awake(planner: Planner, memory: Memory) -> int:
    """Bytes while an engine that sleeps during training (rollout.vllm_sleep) answers: what training keeps from step to
    step, beside its own."""
    rollout, device = planner.job.rollout, planner.device
    if rollout.generator != "vllm" or not rollout.vllm_sleep or not planner.job.rewards:
        return 0
    return memory.weights + memory.optimizer + device.overhead + int(rollout.vllm_memory * device.memory)


def _ladder(planner: Planner, fits: bool, micro_tokens: int, rung: str) -> list[Change]:
    """None of it where a run takes the most there is any use in."""
    at_its_best = (micro_tokens, rung) == (planner.most, rungs_of(planner.job, planner.device)[0])
    return [] if fits and at_its_best else ladder(planner)


def corrected(plan: Plan, planner: Planner, measured: Measured) -> Plan:
    """The plan with its times scaled to those of real steps (the first of them, which warms up, apart), and with the
    overhead that was there; of the rung they fell to, where they did; with the ladder anew."""
    if measured.fell_to is not None:
        said = (
            f"--probe: memory ran out with micro-batches of {plan.micro_tokens:,} tokens, checkpointing "
            f"{plan.checkpointing}; this is the plan of what was left"
        )
        plan = replace(make_plan(planner, measured.fell_to), notes=[*plan.notes, said])
    line = planner.line(plan.checkpointing)
    expected = [planner.step_seconds(streams, plan.checkpointing) for streams in measured.streams]
    skip = 1 if len(expected) > 1 else 0
    factor = sum(measured.seconds[skip:]) / sum(expected[skip:])
    moving = line.memory(max(tokens for streams in measured.streams for tokens in streams))
    overhead = max(0, measured.peak - plan.memory.weights - plan.memory.optimizer - moving)
    memory = replace(plan.memory, overhead=overhead)
    fits = memory.total <= plan.device_memory
    here = planner.with_overhead(max(0, overhead - int(planner.device.slack * moving)))
    note = f"corrected by {len(expected)} real steps: time x {factor:.2f} of what was expected"
    return replace(
        plan,
        memory=memory,
        fits=fits,
        tokens_per_second=plan.tokens_per_second / factor,
        seconds_per_step=plan.seconds_per_step * factor,
        seconds=None if plan.seconds is None else plan.seconds * factor,
        times="corrected",
        ladder=_ladder(here, fits, plan.micro_tokens, plan.checkpointing),
        notes=[*plan.notes, note],
    )


def out_of_memory(plan: Plan, planner: Planner, said: str) -> Plan:
    """The plan of a job whose real steps found no memory on any rung that is open to it, as was `said`."""
    return replace(plan, fits=False, ladder=ladder(planner), notes=[*plan.notes, f"--probe: {said}"])


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
