"""The value of actor and critic by an adapter of its own, beside the policy's on the same base weights.

It is a model with a scalar head (models/score.py) as a reward model is, and its folder is one. Its modules stand around
the policy's frozen tensors (models/shared_base.py), its adapter and head are its own, so that no gradient of the value
comes to what the policy trains, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunery.adapters.lora import Config as LoraConfig
from tunery.config import build
from tunery.engine import Engine
from tunery.errors import ConfigError, ModelError
from tunery.job import Job
from tunery.models.fuse import fuse
from tunery.models.load import base_source, hook_attention
from tunery.models.recompute import recompute
from tunery.models.shared_base import NotShared, scorer_on
from tunery.models.target import ADAPTER
from tunery.models.value_head import make_value_head, needs_values
from tunery.policy import CausalPolicy
from tunery.types import Batch

FOLDER = "value"  # of a run or a checkpoint, where the value's adapter is


def needs_critic(objective: Any) -> bool:
    """Whether an objective asks for a value with an adapter of its own."""
    return bool(getattr(objective, "critic", False))


def check_critic(job: Job, objective: Any) -> None:
    """Raises ConfigError where the job's adapter leaves no base that two could stand on."""
    if not needs_critic(objective):
        return
    if not isinstance(job.adapter, LoraConfig):
        raise ConfigError(
            f"objective.value: separate puts a second adapter on the policy's base, which adapter: {job.adapter.kind} "
            "trains; use adapter: lora, or value: shared"
        )
    if job.adapter.init != "default":
        raise ConfigError(
            f"objective.value: separate needs the base as it was loaded, and adapter.init: {job.adapter.init} takes "
            "the adapter's start out of it; use init: default, or value: shared"
        )


def give_values(
    job: Job, objective: Any, policy: CausalPolicy, engine: Engine, folder: Path | None, resumed: bool
) -> Critic | None:
    """Give the policy what its objective asks values of: a head on its own hidden states, or a Critic, which is
    returned; nothing where it asks for none. From `folder` where that has one; `resumed` as Critic's. Raises
    ModelError."""
    if needs_critic(objective):
        policy.critic = critic = Critic(job, policy.model, engine, folder, resumed)
        return critic
    if needs_values(objective):
        policy.value_head = make_value_head(policy.parts, engine.dtype, engine.device, folder)
    return None


def trained_beside(policy: CausalPolicy, critic: Critic | None) -> Mapping[str, nn.Parameter]:
    """What trains for the values' sake, by name."""
    if critic is not None:
        return critic.trained
    return {} if policy.value_head is None else dict(policy.value_head.named_parameters("value_head"))


class Critic:
    """Batch -> the value of each labelled position, [N], float32 or wider, with a gradient.

    Its adapter has the shape and options of the job's. It begins as the base with a head of zeros, so that all values
    are 0; or as the one in `folder`, which `resumed` runs must have."""

    def __init__(self, job: Job, model: Any, engine: Engine, folder: Path | None, resumed: bool):
        source = base_source(job.model)
        try:
            scorer = scorer_on(model, source)
        except NotShared as why:
            raise ModelError(f"objective.value: separate cannot stand on the policy's base, because {why}") from why
        if job.model.attention == "auto":
            hook_attention(scorer, reference=job.kernels.attention == "reference")
        else:
            scorer.set_attn_implementation(job.model.attention)
        there = folder / FOLDER if folder is not None else None
        start = there if there is not None and (resumed or (there / ADAPTER).is_file()) else None
        engine.seed(job.train.seed, 0)
        self.base, self.adapter = source.name, build("adapters", job.adapter)
        try:
            wrapped = self.adapter.apply(scorer, None if resumed else start, start if resumed else None)
        except ConfigError as error:
            raise ConfigError(f"{error} (objective.value: separate has a scalar in place of the head)") from None
        engine.same_weights(p for p in wrapped.parameters() if p.requires_grad)
        if job.train.checkpointing != "none":
            recompute(wrapped, job.train.checkpointing)
        fuse(wrapped, job.kernels, engine.dtype)
        self.policy = CausalPolicy(wrapped, dtype=engine.dtype, max_length=job.data.max_length)

    def __call__(self, batch: Batch, training: bool) -> Tensor:
        self.policy.model.train(training)
        return self.policy.values(batch, batch.labelled_N)

    @property
    def shares(self) -> bool:
        return self.policy.shares

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """What trains, by name."""
        return {f"{FOLDER}.{n}": p for n, p in self.policy.model.named_parameters() if p.requires_grad}

    def recompute(self, rung: str) -> None:
        recompute(self.policy.model, rung)

    def save(self, folder: Path) -> None:
        """As an adapter folder inside a run's or a checkpoint's, which scores as a reward model's does."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self.adapter.save(self.policy.model, folder / FOLDER, self.base)

    def load(self, folder: Path) -> None:
        self.adapter.load(self.policy.model, folder / FOLDER)
