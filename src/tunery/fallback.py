"""When memory runs out: a run goes on with less, one rung after the other, and takes the same step again.

First smaller streams, down to the longest example, which no cut takes apart; then activations made again in the
backward (models/recompute.py). Both cost time and neither changes the result, but that dropout and NEFTune's noise are
drawn anew for streams that are cut anew. All ranks take each rung together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tunery.errors import ModelError, OutOfMemoryError
from tunery.guard import Gate
from tunery.models.parts import draws
from tunery.models.recompute import recompute
from tunery.models.rungs import RUNGS
from tunery.types import Batch

if TYPE_CHECKING:
    from tunery.job import Job
    from tunery.report import NullReport, Report
    from tunery.setup import Run

T = TypeVar("T")

# Devices that say so when their memory is at its end. A CPU's system promises more than it has and ends the process
# later, without an error, so a rehearsal there would cost a forward and teach nothing.
REHEARSED = ("cuda",)
# What torch, the C library and cuBLAS say, in lower case; torch has a class of its own for CUDA only.
_SAID = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


@dataclass(frozen=True)
class Rung:
    """How a run uses memory: `train.micro_tokens` and `train.checkpointing`."""

    micro_tokens: int
    checkpointing: str

    def below(self, stream: int, longest: int, packing: bool, rungs: tuple[str, ...]) -> Rung | None:
        """The next one, after memory ran out on a stream of `stream` tokens; None at the end. `longest`: tokens of the
        longest example."""
        size = min(self.micro_tokens, stream)
        if packing and size > longest:
            return replace(self, micro_tokens=max(longest, size // 2))
        lower = rungs.index(self.checkpointing) + 1 if self.checkpointing in rungs else len(rungs)
        return replace(self, checkpointing=rungs[lower]) if lower < len(rungs) else None

    def __str__(self) -> str:
        return f"streams of at most {self.micro_tokens:,} tokens, checkpointing {self.checkpointing}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is at its end, the device's or the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)


@contextmanager
def explained() -> Iterator[None]:
    """Where no rung helps: raises OutOfMemoryError in place of what torch says."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"memory ran out, and not on the streams of a step: {str(error).splitlines()[0]}. Take a smaller model, a "
            "device with more memory, or an adapter (adapter: lora) instead of whole weights"
        ) from error


def attempt(make: Callable[[], T]) -> T | None:
    """What `make` returns, or None where memory ran out; what it had made until then is gone."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # only here have the error and the frames it holds gone
    gc.collect()
    torch.cuda.empty_cache()
    return None


def fall(run: Run, report: Report | NullReport, stream: int, longest: int, when: str) -> None:
    """Take the next rung, the same on every rank, after memory ran out on a stream of `stream` tokens (the largest of
    any rank's); `longest` as Rung.below. Raises OutOfMemoryError where there is none."""
    train = run.job.train
    rung = Rung(run.cut.budget, train.checkpointing)
    rungs = RUNGS if run.engine.device.type == "cuda" else RUNGS[:-1]  # a CPU has no other memory to put anything in
    lower = rung.below(stream, longest, run.cut.packing, rungs)
    if lower is None:
        raise _at_the_end(run, rung, stream, when)
    if lower.checkpointing != rung.checkpointing:
        try:
            recompute(run.model, lower.checkpointing)
            if run.critic is not None:
                run.critic.recompute(lower.checkpointing)
        except ModelError as error:  # its layers cannot be found
            raise _at_the_end(run, rung, stream, when) from error
    run.job = run.job.model_copy(update={"train": train.model_copy(update=asdict(lower))})
    run.cut = run.loader.how = replace(run.cut, budget=lower.micro_tokens)
    run.state["fallen_to"] = asdict(lower)
    redrawn = lower.micro_tokens != rung.micro_tokens and (train.neftune is not None or draws(run.model))
    same = "as good a result; dropout and noise are drawn anew for these" if redrawn else "same result"
    report.note(f"memory ran out {when}, on a stream of {stream:,} tokens; going on with {lower} ({same})")


def _at_the_end(run: Run, rung: Rung, stream: int, when: str) -> OutOfMemoryError:
    adapter = "" if run.job.adapter.kind == "lora" else "; or train an adapter (adapter: lora) instead of whole weights"
    return OutOfMemoryError(
        f"memory ran out {when}, on a stream of {stream:,} tokens, and nothing is left that would not change the "
        f"result ({rung}). Lower data.max_length (now {run.job.data.max_length:,}){adapter}; "
        "or take a smaller model, or a device with more memory. Checkpoints are whole, and the same command goes on"
    )


def resumed(job: Job, state: dict[str, Any]) -> Job:
    """The job on the rung that the run had fallen to by its checkpoint, so that it goes on bit for bit, and does not
    run out of memory again."""
    fallen = state.get("fallen_to")
    if fallen is None:
        return job
    lower = Rung(**fallen)
    tokens = min(job.train.micro_tokens or lower.micro_tokens, lower.micro_tokens)
    checkpointing = max(job.train.checkpointing, lower.checkpointing, key=RUNGS.index)
    train = job.train.model_copy(update=asdict(Rung(tokens, checkpointing)))
    return job.model_copy(update={"train": train})


# ---------------------------------------------------------------- before the first step


def rehearse(run: Run, report: Report | NullReport, gate: Gate) -> None:
    """Forward and backward of this rank's largest stream, with the optimizer's moments in place, and down the rungs
    until it fits; so that a run learns in its first second what it would in its last hour. Nothing else comes of it:
    gradients are thrown away, and so is what was drawn at random."""
    while True:
        stream, several = run.loader.largest_stream(run.start, run.total_steps)
        fits = stream is None or attempt(lambda stream=stream, several=several: _once(run, gate, stream, several))
        run.optimizer.zero_grad(set_to_none=True)
        size = run.engine.largest(0 if fits or stream is None else stream.n_tokens)
        if not size:
            return
        fall(run, report, size, run.loader.longest or 0, "in the rehearsal of the largest stream")


def _once(run: Run, gate: Gate, stream: Batch, several: bool) -> bool:
    """`several`: a step has more streams than this one, so this one's backward may find gradients in place."""
    device, was_training = run.engine.device, run.model.training
    gate.make_moments(run.parameters)
    if several:
        for parameter in run.parameters:
            parameter.grad = torch.zeros_like(parameter)
    run.model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # without the numbers of its rows it is a stream like another, of which nothing is remembered
        run.objective.loss(run.policy, replace(stream, rows=[]).to(device)).sum.backward()
    run.model.train(was_training)
    return True
