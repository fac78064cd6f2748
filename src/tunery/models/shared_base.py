"""A reward model around a language model's own weights: what both have in common is in memory once.

A second tree of modules is made on the meta device, and every parameter and buffer of its backbone is the very tensor
of the language model. The modules are its own: an adapter, fast paths and modes of one model are nothing to the other,
and what is saved or trained of one holds nothing of the other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunery.errors import ModelError
from tunery.models.load import ModelConfig, load_config, resolve_name
from tunery.models.parts import unwrap
from tunery.models.score import scorer_from_config


class NotShared(ModelError):
    """Why the weights cannot be shared, as the end of a sentence with "because"."""


def same_base(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether both name the same weights: one folder, or one name and revision."""
    if one.random_init or other.random_init:
        return False
    mine, theirs = Path(resolve_name(one.name)), Path(resolve_name(other.name))
    if mine.is_dir() or theirs.is_dir():
        return mine.resolve() == theirs.resolve()
    return (one.name, one.revision or "main") == (other.name, other.revision or "main")


def scorer_on(model: Any, source: ModelConfig) -> Any:
    """A model with a scalar head (models/score.py) whose backbone is that of `model`, a causal language model loaded
    from `source`, with or without PEFT around it. The head is zeros, in float32 at least: an adapter of a reward model
    brings its own. Raises NotShared where something of the backbone trains, or is not what transformers makes of
    `source`; ModelError for a family without sequence classification."""
    causal = unwrap(model)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer: Any = scorer_from_config(source, load_config(source), dtype=causal.dtype)
    _adopt(scorer.get_decoder(), causal.get_decoder())
    head = scorer.score.to_empty(device=causal.device).to(torch.promote_types(causal.dtype, torch.float32))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    left = [name for name, tensor in [*scorer.named_parameters(), *scorer.named_buffers()] if tensor.is_meta]
    if left:
        raise NotShared(f"{left[0]} is no part of the policy's model")
    return scorer.requires_grad_(False)


def _adopt(mine: nn.Module, theirs: nn.Module) -> None:
    """Put the tensors of a tree of modules, adapters around them left out, into another of the same classes."""
    theirs = _plain(theirs)
    if type(mine) is not type(theirs):
        raise NotShared(f"{type(theirs).__name__} stands where {type(mine).__name__} does in a model as it is loaded")
    if any(parameter is not None and parameter.requires_grad for parameter in theirs._parameters.values()):
        raise NotShared("the policy trains some of the base's own weights")
    pairs: list[tuple[Any, Any]] = [(mine._parameters, theirs._parameters), (mine._buffers, theirs._buffers)]
    for own, other in pairs:
        if own.keys() != other.keys() or any(_shape(own[name]) != _shape(other[name]) for name in own):
            raise NotShared(f"{type(mine).__name__} has other weights in the policy's model")
        own.update(other)
    for name, value in vars(mine).items():
        if isinstance(value, Tensor):  # such as the frequencies that a rotary embedding began with
            setattr(mine, name, getattr(theirs, name))
    for name, child in mine.named_children():
        if name not in theirs._modules:
            raise NotShared(f"{type(mine).__name__} has no {name} in the policy's model")
        _adopt(child, theirs.get_submodule(name))


def _plain(module: nn.Module) -> nn.Module:
    """The library's own module inside what PEFT has put around it: an update, or a copy that is trained whole."""
    for name in ("base_layer", "original_module"):
        inner = module._modules.get(name)
        if inner is not None:
            return _plain(inner)
    return module


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
