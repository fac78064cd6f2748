"""What can be read and checked of a job without a model: its configuration as a whole, its tokenizer and its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunery.config import build
from tunery.critic import check_critic
from tunery.data.dataset import Prepared, prepare
from tunery.data.store import TokenStore
from tunery.data.template import ChatTemplate, load_template
from tunery.engine import check_dtype
from tunery.errors import ConfigError
from tunery.job import Job, head_of
from tunery.models.load import load_config, load_tokenizer, resolve_name
from tunery.rollout.build import check_rollouts, generates, make_rewards
from tunery.rollout.scoring import Rewards
from tunery.teacher import check_kept, check_teacher
from tunery.trackers import require
from tunery.types import Objective


def check_job(job: Job) -> None:
    """What can be wrong with a configuration as a whole. Raises ConfigError."""
    data, model = job.data, job.model
    if not data.train:
        raise ConfigError("data.train: is required: a path, or a list of paths")
    if data.streaming and job.train.max_steps is None:
        raise ConfigError("train.max_steps: is required with data.streaming, because the length is not known")
    check_dtype(model.dtype)
    require(job.report)
    if data.eval is None:
        for key, value in (("patience", job.eval.patience), ("generate", job.eval.generate or None)):
            if value is not None:
                raise ConfigError(f"eval.{key}: {value} needs held-out rows; set data.eval to a file or a fraction")
    if head_of(job) is not None and job.eval.generate:
        raise ConfigError(
            f"eval.generate: {job.eval.generate}, but objective {job.objective.kind} makes a model that scores answers "
            "and gives none; set it to 0"
        )
    if model.random_init and not build("adapters", job.adapter).whole:
        raise ConfigError(
            "model.random_init: an adapter of random weights fits no base that anyone has; use adapter: full"
        )
    folder = Path(resolve_name(model.name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: {model.name} is an adapter; give its base as model.name and the adapter as model.init_from"
        )
    if folder.is_dir() and model.revision is not None:
        raise ConfigError(f"model.revision: {model.name} is a local folder, which has no revisions")


def read_template(job: Job) -> tuple[Any, ChatTemplate]:
    """The tokenizer, and the template as the data section wants it."""
    tokenizer, data = load_tokenizer(job.model), job.data
    return tokenizer, load_template(
        data.template, tokenizer, max_length=data.max_length, too_long=data.too_long, system=data.system
    )


@dataclass
class Read:
    """What can be read and checked without a model."""

    tokenizer: Any
    template: ChatTemplate
    objective: Objective
    data: Prepared
    rewards: Rewards | None = None


def read_data(job: Job, console: Any = None) -> Read:
    """Tokenizer, template, objective and tokenised data. Happens before the engine starts, because a process that has
    touched CUDA cannot fork the ones that tokenise."""
    data = job.data
    check_job(job)
    if data.streaming and not job.train.shuffle:
        data = data.model_copy(update={"shuffle_buffer": 1})
    tokenizer, template = read_template(job)
    objective = build("objectives", job.objective)
    check_rollouts(job, objective)
    check_teacher(job, tokenizer)
    check_critic(job, objective)
    prepared = prepare(
        data, template, objective, seed=job.train.seed, cache_key=job.objective.model_dump_json(), console=console
    )
    check_kept(job, [prepared.train, prepared.eval])
    rewards = make_rewards(job, prepared) if generates(objective) else None
    return Read(tokenizer, template, objective, prepared, rewards)


def beyond_context(job: Job, data: Prepared) -> str | None:
    """A warning where rows are longer than the model's context. Raises ConfigError where the model has a learned
    embedding for each position, and none beyond."""
    text = load_config(job.model).get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is None or not isinstance(data.train, TokenStore):
        return None
    longer = int((np.diff(data.train.sequence_offsets) > context).sum())
    if not longer:
        return None
    what = f"{longer:,} sequences are longer than the {context} tokens {job.model.name} was made for"
    if not (getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)):
        raise ConfigError(f"data.max_length: {what}, and it has no positions beyond; set it to {context} at most")
    return f"{what}; it may not make sense of what comes after. Set data.max_length to {context}"
