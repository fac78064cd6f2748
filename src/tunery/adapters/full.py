"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunery.config import KindConfig
from tunery.models.parts import load_whole, save_whole, to_master


class Config(KindConfig):
    kind: str = "full"


class Adapter:
    """`whole`: a checkpoint holds the whole model, and that is what a resume loads in place of the base."""

    whole = True
    changes_base = False
    default_lr = 2e-5

    def __init__(self, config: Config):
        self.config = config

    def apply(self, model: Any, start: Path | None = None, resume: Path | None = None) -> Any:
        """Make every parameter trainable, in float32; returns the model."""
        for parameter in model.parameters():
            to_master(parameter)
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
