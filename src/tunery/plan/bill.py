"""The plan of a run: every number a person may want before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tunery.devices import Device
from tunery.job import Job
from tunery.plan.choose import best, rungs_of
from tunery.plan.ladder import Change, ladder
from tunery.plan.planner import Memory, Planner
from tunery.plan.work import AssumedRows, Rows


@dataclass
class Plan:
    """Sizes in bytes, times in seconds. `tokens` of the whole run; None where the end of the data is not known."""

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
    tokens_per_second: float
    seconds_per_step: float
    steps: int | None
    tokens: int | None
    seconds: float | None
    disk: int
    ladder: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def make_plan(job: Job, rows: Rows, device: Device, world: int = 1) -> Plan:
    """The plan of `job` on `device`, with `world` ranks. Raises ModelError and ConfigError for a model or an adapter
    that cannot be."""
    planner = Planner(job, rows, device, world)
    micro_tokens, rung = best(planner, rungs_of(job, device))
    memory, work = planner.memory(micro_tokens, rung), planner.work(micro_tokens)
    seconds = planner.seconds(micro_tokens, rung)
    fits = memory.total <= device.memory
    first = rungs_of(job, device)[0]
    notes = []
    if isinstance(rows, AssumedRows):
        notes.append(
            f"the rows are not read: each is taken to be {job.data.max_length} tokens (data.max_length), all trained on"
        )
    return Plan(
        model=job.model.name,
        adapter=job.adapter.kind,
        device=device.name,
        device_memory=device.memory,
        ranks=world,
        dtype=str(planner.dtype).removeprefix("torch."),
        parameters=planner.shadow.parameters,
        trainable=planner.shadow.trainable,
        micro_tokens=micro_tokens,
        checkpointing=rung,
        memory=memory,
        fits=fits,
        flops_per_token=planner.flops_per_token,
        tokens_per_second=work.tokens / seconds,
        seconds_per_step=seconds,
        steps=work.steps,
        tokens=None if work.steps is None else round(work.tokens * work.steps),
        seconds=None if work.steps is None else seconds * work.steps,
        disk=_disk(planner, work.steps),
        ladder=[] if fits and (micro_tokens, rung) == (planner.most, first) else ladder(planner),
        notes=notes,
    )


def _disk(planner: Planner, steps: int | None) -> int:
    """Checkpoints kept and the result: weights of what is saved, and the optimizer's states."""
    train, shadow = planner.job.train, planner.shadow
    weights = shadow.weight_bytes if shadow.whole else shadow.gradient_bytes
    kept = train.keep if train.keep is not None else steps or 1
    written = min(kept, steps or kept)
    return written * (weights + planner.optimizer[0]) + weights
