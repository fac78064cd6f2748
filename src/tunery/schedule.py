"""The learning rate as a pure function of progress, so that a resumed run cannot restart it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from tunery.config import Config, Steps


class ScheduleConfig(Config):
    """The `schedule:` section. In YAML a bare name stands for {kind: ...}."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    warmup: Steps = Field(default=0.03, ge=0, description="a share of all steps when below 1, else steps")
    decay: Steps = Field(default=0.1, ge=0, description="wsd: the final linear decay, a share of all steps or steps")
    min_ratio: float = Field(default=0.0, ge=0, le=1, description="the learning rate ends at this share of its peak")

    @model_validator(mode="after")
    def _has_an_effect(self) -> ScheduleConfig:
        if self.kind != "wsd" and self.decay != ScheduleConfig.model_fields["decay"].default:
            raise ValueError(f"decay is for wsd; {self.kind} has none")
        if self.kind == "constant" and self.min_ratio:
            raise ValueError("min_ratio: constant does not come down; wsd stays and then does")
        return self


def _steps(value: float | int, total: int) -> int:
    return math.ceil(value * total) if value < 1 else int(value)


def factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Multiplier of the peak learning rate for update `step` (0-based) of `total`.

    Linear warm-up from 1/w to 1 over the first w updates, then the shape, ending at `min_ratio`. cosine: half a
    period (Loshchilov & Hutter, SGDR, arXiv:1608.03983, eq. 5 without restarts); wsd: warm-up, stable, decay
    (Hu et al., MiniCPM, arXiv:2404.06395), the decay linear."""
    warm = _steps(config.warmup, total)
    if step < warm:
        return (step + 1) / warm
    if config.kind == "constant":
        return 1.0
    progress = min(1.0, (step - warm) / max(1, total - warm))
    if config.kind == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.kind == "linear":
        shape = 1.0 - progress
    else:
        decay = max(1, _steps(config.decay, total))
        shape = min(1.0, max(0, total - step) / decay)
    return config.min_ratio + (1.0 - config.min_ratio) * shape


def interval(value: int | float | None, total: int, default: int) -> int:
    """Steps between two of something: given as steps, as a share of the run, or by default."""
    if value is None:
        return max(1, default)
    return max(1, math.ceil(value * total)) if value < 1 else int(value)
