"""What a job leaves to us, decided: learning rate, dtype, and how a step is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunery.config import build
from tunery.data.store import TokenStore
from tunery.devices import Device, this_device
from tunery.engine import Engine
from tunery.job import Job, load_job
from tunery.plan.choose import choose
from tunery.plan.work import AssumedRows
from tunery.read import Read
from tunery.rollout.build import generates
from tunery.run_folder import CONFIG, find_resume


def resolve(job: Job, engine: Engine, read: Read | None = None) -> Job:
    """The job with everything left to us decided, so that the saved configuration reproduces the run elsewhere.
    `read`: its data, for the micro-batches that fit memory."""
    optimizer, model = job.optimizer, job.model
    adapter = build("adapters", job.adapter)
    if getattr(optimizer, "lr", 0.0) is None:
        optimizer = optimizer.model_copy(update={"lr": adapter.default_lr})
    model = model.model_copy(update={"dtype": str(engine.dtype).removeprefix("torch.")})
    job = job.model_copy(update={"optimizer": optimizer, "model": model})
    tokens, rung = _saved_cut(job) or _chosen_cut(job, engine, read)
    train = job.train.model_copy(update={"micro_tokens": tokens, "checkpointing": rung})
    return job.model_copy(update={"train": train})


def _saved_cut(job: Job) -> tuple[int, str] | None:
    """train.micro_tokens and train.checkpointing of the run that is gone on with, where the job leaves them open: the
    same streams round the same, wherever and beside whatever the run goes on."""
    checkpoint_folder = find_resume(job, Path(job.output))
    saved = checkpoint_folder.parent / CONFIG if checkpoint_folder is not None else None
    if saved is None or not saved.is_file():
        return None
    train, then = job.train, load_job(saved).train
    rung = then.checkpointing if train.checkpointing == "auto" else train.checkpointing
    tokens = train.micro_tokens or then.micro_tokens
    return None if tokens is None or rung == "auto" else (tokens, rung)


def _chosen_cut(job: Job, engine: Engine, read: Read | None) -> tuple[int, str]:
    """The same by plan, for the rank with the least memory."""
    job, rows = planned(job, read)
    device = for_training(this_device(engine.device.type), job)
    memory = min(engine.gather(device.memory))
    if device.kind == "cpu":
        memory //= engine.world
    return engine.gather(choose(job, rows, replace(device, memory=memory), engine.world))[0]


def planned(job: Job, read: Read | None) -> tuple[Job, TokenStore | AssumedRows]:
    """The rows a plan is made for, and the job that takes them. Of rows that nobody has read each is taken to be as
    long as it may be, and so are answers to be generated: a step takes those of its prompts one by one."""
    data = read.data.train if read is not None else None
    rows = data if isinstance(data, TokenStore) else AssumedRows(job.train.batch_size, job.data.max_length)
    if read is None or read.rewards is None:
        return job, rows
    answers = max(1, job.train.batch_size * job.rollout.group // job.rollout.minibatches)
    longest = int(rows.lengths.max()) + job.rollout.max_new_tokens
    train = job.train.model_copy(update={"batch_size": answers})
    return job.model_copy(update={"train": train}), AssumedRows(answers, longest)


def for_training(device: Device, job: Job) -> Device:
    """The device without the memory that a generator of rollouts takes for itself."""
    if not generates(build("objectives", job.objective)):
        return device
    return replace(device, memory=int(device.memory * job.rollout.left))
