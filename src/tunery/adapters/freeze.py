"""Freeze-tuning: a few layers train, the rest stands still."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from tunery.config import KindConfig
from tunery.errors import ConfigError
from tunery.models.parts import layer_list, load_whole, save_whole, score_head, to_master


class Config(KindConfig):
    kind: str = "freeze"
    layers: int = Field(2, description="the last n layers; negative: the first n; 0: only `extra`")
    modules: list[str] = Field([], description="only these modules of those layers, e.g. [mlp]; empty: all of them")
    extra: list[str] = Field([], description="modules outside the layers as well, e.g. [embed_tokens, norm, lm_head]")
    cache: Literal["auto"] | bool = Field(
        "auto",
        description="keep what the frozen layers give in the first epoch, in a file of the run folder, and begin later "
        "epochs with it; same result, faster. auto: where it pays",
    )


class Adapter:
    """`whole`: a checkpoint holds the whole model. Trained parameters are float32, frozen ones stay as loaded."""

    whole = True
    changes_base = False
    default_lr = 2e-5

    def __init__(self, config: Config):
        self.config = config

    def apply(self, model: Any, start: Path | None = None, resume: Path | None = None) -> Any:
        """Freeze everything but the chosen layers and modules, and a scalar head; returns the model. Raises ConfigError
        for a module name the model does not have, or when nothing would train."""
        config = self.config
        prefix, layers = layer_list(model)
        if abs(config.layers) > len(layers):
            raise ConfigError(f"adapter.layers: {config.layers}, but the model has {len(layers)} layers")
        chosen = range(len(layers))[-config.layers :] if config.layers > 0 else range(-config.layers)
        inside = [f"{prefix}.{i}." for i in chosen]
        matched: set[str] = set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            home = next((p for p in inside if name.startswith(p)), None)
            wanted = config.modules if home else config.extra
            hit = next((m for m in wanted if re.search(rf"(^|\.){re.escape(m)}(\.|$)", name)), None)
            if hit is not None:
                matched.add(hit)
            if hit is not None or (home and not config.modules):
                to_master(parameter)
        missing = [m for m in [*config.modules, *config.extra] if m not in matched]
        if missing:
            raise ConfigError(f"adapter: the model has no module named {', '.join(missing)} there")
        head = score_head(model)
        for parameter in head.parameters() if head is not None else ():
            to_master(parameter)
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("adapter: nothing would train; give layers or extra")
        return model

    def lr_scale(self, name: str) -> float:
        """Multiplier of the learning rate for the parameter of this name."""
        return 1.0

    def save(self, model: Any, folder: Path, base: str) -> None:
        """A Hugging Face model folder, parameters as they train."""
        save_whole(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        """Put the weights of a checkpoint of this run into the model."""
        load_whole(model, folder)

    def finish(self, model: Any, folder: Path, base: str, dtype: torch.dtype) -> None:
        """What the run leaves behind: the model in the dtype its base was stored in."""
        save_whole(model, folder, dtype)
