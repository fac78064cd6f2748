"""The `rollout:` section: how prompts are answered while training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunery.config import Config


class RolloutConfig(Config):
    """The `rollout:` section, for objectives that generate."""

    group: int = Field(default=8, ge=1, description="answers to each prompt, compared with one another")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=1.0, gt=0, description="of the sampling, and of the probabilities trained on")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample among the likeliest that hold this probability")
    top_k: int = Field(default=0, ge=0, description="sample among this many likeliest tokens; 0: all")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps that a batch of answers is split into")
    iterations: int = Field(default=1, ge=1, description="passes over a batch of answers")
    resample: int = Field(
        default=0, ge=0, description="rounds of further prompts in place of groups of equal reward (DAPO); 0: keep them"
    )
    mask_truncated: bool = Field(
        default=False, description="answers that did not end by themselves are not trained on (DAPO)"
    )
    generator: Literal["hf", "vllm"] = Field(
        default="hf",
        description="hf: the model that trains; vllm: an engine of its own beside it, which takes memory and is given "
        "the weights before each rollout",
    )
    batch_tokens: int = Field(default=65536, ge=1, description="tokens of answers generated at a time, by hf")
    vllm_memory: float = Field(
        default=0.3, gt=0, lt=1, description="share of the device's memory that vllm takes, for weights and cache"
    )
    vllm_sleep: bool = Field(default=False, description="vllm gives its memory back while the policy trains")
    shown: int = Field(default=4, ge=0, description="answers of each batch that are kept in rollouts.jsonl")

    @property
    def left(self) -> float:
        """The share of the device's memory that the generator leaves to training."""
        return 1.0 - self.vllm_memory if self.generator == "vllm" and not self.vllm_sleep else 1.0
