"""The value head of actor and critic: one number for each position, read from the same hidden states as the next token.

It stands beside the model and is no part of it, so what is saved of the model is what it would be without, and serving
needs nothing of it. It begins at 0, or with that of the folder which the run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunery.errors import ModelError
from tunery.models.parts import Parts

FILE = "value_head.safetensors"


def needs_values(objective: Any) -> bool:
    """Whether an objective asks for policy.logps_and_values."""
    return bool(getattr(objective, "value_head", False))


def make_value_head(parts: Parts | None, dtype: torch.dtype, device: Any, folder: Path | None = None) -> nn.Linear:
    """Hidden size to one number, in float32 at least: zeros, or what `folder` has where it has a value head. Raises
    ModelError where the model is not a backbone and a head, or the folder's is of another size."""
    if parts is None:
        raise ModelError("objective: a value head needs a model that is a backbone and a language head; take another")
    size = parts.causal.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, dtype=torch.promote_types(dtype, torch.float32), device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if folder is not None and (folder / FILE).is_file():
        load_value_head(head, folder)
    return head


def save_value_head(head: nn.Linear, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in head.named_parameters()}, folder / FILE)


def load_value_head(head: nn.Linear, folder: Path) -> None:
    """Raises ModelError where it is missing or does not fit."""
    from safetensors.torch import load_file

    try:
        head.load_state_dict(load_file(folder / FILE))
    except (OSError, RuntimeError) as error:
        what = str(error).splitlines()[-1].strip()
        raise ModelError(f"{folder / FILE}: is not the value head of this model: {what}") from error
