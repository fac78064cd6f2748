"""Reward models, as a plan sees them: their weights beside the policy's."""

from __future__ import annotations

import copy
import warnings

import torch

from tunery.config import build
from tunery.job import Job
from tunery.models.load import base_source, load_config
from tunery.models.score import scorer_from_config
from tunery.models.shared_base import same_base
from tunery.models.target import check_kind, has_biases, resolve_target
from tunery.rewards.model import Config


def reward_bytes(job: Job, dtype: torch.dtype) -> int:
    """Of the weights of the job's reward models, from their config.json and their adapters' files; of one that uses the
    policy's base weights (rewards/model.py), of its adapter alone. Where they are to compute in whatever suits the
    device, that is taken to be `dtype`. Raises ModelError for a target that is no reward model."""
    return sum(_bytes(job, config, dtype) for config in job.rewards if isinstance(config, Config) and config.target)


def _bytes(job: Job, config: Config, dtype: torch.dtype) -> int:
    target = resolve_target(config.target)
    check_kind(target, scores=True)
    own = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    adapter = (
        0 if target.adapter is None else sum(path.stat().st_size for path in target.adapter.glob("adapter_model.*"))
    )
    shares = (
        adapter
        and not has_biases(target)
        and own == dtype
        and _keeps_base(job)
        and same_base(target.base, base_source(job.model))
    )
    if shares:
        return adapter
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scorer_from_config(target.base, copy.deepcopy(load_config(target.base)), dtype=own)
    return adapter + sum(p.numel() * p.element_size() for p in model.parameters())


def _keeps_base(job: Job) -> bool:
    """Whether the policy's base weights stay what they were loaded as: not where they train, nor under PiSSA."""
    return not build("adapters", job.adapter).whole and getattr(job.adapter, "init", "default") == "default"
