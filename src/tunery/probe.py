"""Three real steps of a job on this device: what they take is what the plan is corrected by.

Weights are loaded and updated in memory; nothing is written."""

from __future__ import annotations

import itertools
import time
from contextlib import suppress
from pathlib import Path

import torch

from tunery.engine import Engine
from tunery.errors import ConfigError
from tunery.fallback import explained
from tunery.guard import Gate
from tunery.job import Job
from tunery.plan.bill import Measured
from tunery.read import Read
from tunery.reference import measure_with_reference
from tunery.report import NullReport
from tunery.resolve import resolve
from tunery.setup import Run, set_up
from tunery.step import gradients, total_weight, update

STEPS = 3


@explained()
def probe(job: Job, read: Read, micro_tokens: int, rung: str, steps: int = STEPS) -> Measured:
    """Run the first `steps` of `job`, cut as planned; where memory runs out on them, as many after the fall, which are
    those that count. Raises ConfigError where the data come as a stream, OutOfMemoryError where memory ran out and
    there is no rung left or none would help, and what a run itself would raise."""
    if job.data.streaming:
        raise ConfigError("--probe: takes rows that are read before training; data.streaming is on")
    train = job.train.model_copy(update={"micro_tokens": micro_tokens, "checkpointing": rung, "resume": False})
    engine = Engine(job.model.dtype)
    try:
        run = set_up(resolve(job.model_copy(update={"train": train}), engine, read), engine, read, None)
        measure_with_reference(run)
        _forget_peak(engine)
        run.model.train()
        gate = Gate(run.optimizer, engine.device)
        done, asked = [], run.job.train
        for step in itertools.count():
            before = run.job.train
            taken = _step(run, gate, step % run.total_steps)
            done = [*done, taken] if run.job.train == before else []  # a step that fell has two attempts in its time
            if len(done) == min(steps, run.total_steps):
                break
        train = run.job.train
        fell_to = None if train == asked else (run.cut.budget, train.checkpointing)
        return Measured([streams for streams, _ in done], [seconds for _, seconds in done], _peak(engine), fell_to)
    except BaseException:
        if engine.world > 1:
            engine.leave()
        raise


def _step(run: Run, gate: Gate, step: int) -> tuple[list[int], float]:
    """The tokens of its streams, and seconds."""
    work = run.loader.step(step)
    start = time.perf_counter()
    weight, _ = total_weight(run, work, interrupted=False)
    loss, metrics = gradients(run, NullReport(), step, work, weight)
    update(run, gate, step, work, weight, loss, metrics).numbers.read()
    if run.engine.device.type == "cuda":
        torch.cuda.synchronize(run.engine.device)
    return [batch.n_tokens for batch in work.recut(run.cut).micro], time.perf_counter() - start


def _forget_peak(engine: Engine) -> None:
    """What loading took is not what training takes."""
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
        return
    with suppress(OSError):  # Linux: the high-water mark begins again
        Path("/proc/self/clear_refs").write_text("5")


def _peak(engine: Engine) -> int:
    """Bytes, with what the allocator holds beside the tensors."""
    if engine.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(engine.device)
        return total - free
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return engine.memory()
