"""AdamW, fused: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from tunery.config import KindConfig


class Config(KindConfig):
    kind: str = "adamw"
    lr: float | None = Field(None, gt=0, description="peak rate; null: 2e-4 for an adapter, 2e-5 for whole weights")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; never on biases and norms")
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")


def Optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2) over parameter groups that already carry their `lr`
    and `weight_decay`. One fused kernel for all parameters."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=config.eps, fused=True)
