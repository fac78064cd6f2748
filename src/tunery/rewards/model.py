"""A reward model's score: one that objective reward trained, or that transformers loads as sequence classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tunery.errors import ConfigError
from tunery.rewards import RewardConfig
from tunery.types import Answer, Message


class Config(RewardConfig):
    kind: str = "model"
    target: str = Field("", description="the reward model: a run, adapter or model folder, or a hub name")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="of its arithmetic; auto: bfloat16 on a GPU that has it, else float32"
    )
    device: str = Field("auto", description="where it runs: auto, cpu, cuda, cuda:1, ...")


class Reward:
    """The value of its scalar head at the end of the conversation with the answer, in the reward model's own template.
    An answer that was cut off is closed as if it had ended there."""

    def __init__(self, config: Config):
        if not config.target:
            raise ConfigError("rewards: model needs a target, the reward model to ask")
        from tunery.generate.score import RewardModel  # torch, which the schema of the options does without

        self.model = RewardModel(config.target, dtype=config.dtype, device=config.device)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        conversations = [[*answer.prompt, Message("assistant", answer.text)] for answer in answers]
        return [*self.model.score(conversations)]
