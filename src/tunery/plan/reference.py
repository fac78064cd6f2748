"""What the reference of a preference objective costs a run (see tunery/reference.py for the two ways to have it), and
the teacher of a distillation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tunery.memory import Profile
from tunery.plan.planner import Planner
from tunery.progress import clock_text, human

# Of a step's arithmetic, where the model's code does not say: the backward is twice the forward.
USUAL_FORWARD = 1 / 3
BYTES = 4  # of a log-prob in the file


@dataclass(frozen=True)
class ReferenceCost:
    """`memory` in bytes all the time, `disk` in bytes while the run lasts, `each_step` and `once` in seconds; `note`
    says so to a person."""

    memory: int
    disk: int
    each_step: float
    once: float
    note: str


def reference_cost(planner: Planner, micro_tokens: int, rung: str) -> ReferenceCost | None:
    """Of the planner's job with such a cut, None where its objective needs none. Held-out rows are left out."""
    if not getattr(planner.objective, "reference", False):
        return None
    job, work = planner.job, planner.work(micro_tokens)
    share = forward_share(planner.profile(work.largest, rung, work.accumulates))
    forward = share * planner.seconds(micro_tokens, rung) / planner.models
    generated = getattr(planner.objective, "generates", False)
    if job.data.streaming or generated or getattr(job.objective, "reference", "auto") == "live":
        copy = planner.shadow.gradient_bytes  # as many numbers as there are gradients, of the same width
        note = f"the reference runs beside the policy: {forward:.2g} s of each step, and a copy of {human(copy)}B"
        return ReferenceCost(copy, 0, forward, 0.0, note)
    steps = min(work.steps or 0, work.steps_per_epoch or 0)
    once, disk = steps * forward, int(BYTES * work.tokens * (work.steps_per_epoch or 0))
    note = (
        f"the reference's log-probs come first, in one pass of about {clock_text(once)} that is counted here, and take "
        f"{human(disk)}B in the run folder"
    )
    return ReferenceCost(0, disk, 0.0, once, note)


def teacher_seconds(planner: Planner, micro_tokens: int, rung: str) -> float:
    """Of a step's teacher: the student's forward, by the weights of both."""
    work, shadow = planner.work(micro_tokens), planner.shadow
    share = forward_share(planner.profile(work.largest, rung, work.accumulates))
    size = shadow.teacher_bytes / (shadow.parameters * planner.dtype.itemsize)
    return share * planner.seconds(micro_tokens, rung) * size


def forward_share(profile: Profile) -> float:
    """The forward's part of the arithmetic of a micro-batch."""
    count, flops = Counter(profile.layers), Counter[bool]()
    for name, span in profile.spans.items():
        backward = name == "tail" or (isinstance(name, tuple) and name[0] == "backward")
        times = count[name[1]] if isinstance(name, tuple) else 1
        flops[backward] += times * sum(operation[1] * often for operation, often in span.work.items())
    if not flops[True]:  # by formula, which puts all work in one place
        return USUAL_FORWARD
    return flops[False] / (flops[False] + flops[True])
