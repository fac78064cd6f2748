"""Fast paths, each beside its slow and obvious reference. Which of them run is the `kernels:` section."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunery.config import Config

Switch = Literal["auto", "reference"]


class KernelsConfig(Config):
    """The `kernels:` section. `auto` takes the fastest form that is exact for the model on this device; `reference`
    switches one off, and the single word `kernels: reference` all of them."""

    attention: Switch = Field(
        default="auto", description="packed attention; reference: torch's own, one sequence after another"
    )
    head: Switch = Field(
        default="auto", description="chunked output head; reference: the logits of all labelled tokens at once"
    )
    lora: Switch = Field(
        default="auto", description="one function per group of projections; reference: PEFT's own forward"
    )
    norm: Switch = Field(default="auto", description="fused RMSNorm; reference: the library's")
    rotary: Switch = Field(default="auto", description="fused rotary embedding; reference: the library's")
    mlp: Switch = Field(default="auto", description="fused SwiGLU; reference: the library's")


def one_word(value: Any) -> Any:
    """The section given as one word, for all of its switches."""
    return dict.fromkeys(KernelsConfig.model_fields, value) if isinstance(value, str) else value
