"""A reward model's score: one that objective reward trained, or that transformers loads as sequence classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunery.errors import ConfigError
from tunery.rewards import Host, RewardConfig
from tunery.types import Answer, Message

if TYPE_CHECKING:
    from tunery.generate.score import RewardModel


class Config(RewardConfig):
    kind: str = "model"
    target: str = Field("", description="the reward model: a run, adapter or model folder, or a hub name")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="of its arithmetic; auto: the policy's where it uses the policy's base weights, else bfloat16 on a "
        "GPU that has it, else float32",
    )
    device: str = Field("auto", description="where it runs: auto, cpu, cuda, cuda:1, ...")


class Reward:
    """The value of its scalar head at the end of the conversation with the answer, in the reward model's own template.
    An answer that was cut off is closed as if it had ended there.

    An adapter of a reward model on the policy's own base is put on the policy's base weights, which are in memory once
    (models/shared_base.py), where nothing of them changes: with an adapter that trains beside them. Raises ConfigError
    without a target, ModelError for one that is no reward model."""

    def __init__(self, config: Config):
        if not config.target:
            raise ConfigError("rewards: model needs a target, the reward model to ask")
        from tunery.models.target import check_kind, resolve_target  # what the schema of the options does without

        self.config = config
        self.target = resolve_target(config.target)
        check_kind(self.target, scores=True)
        self.model: RewardModel | None = None

    def load(self, host: Host) -> list[str]:
        """Load the reward model, with the policy's base weights or its own. Says which, where there was a choice."""
        from tunery.generate.score import RewardModel
        from tunery.models.shared_base import NotShared, same_base

        notes = []
        if self.target.adapter is not None and same_base(self.target.base, host.source):
            try:
                self._check_shared(host)
                self.model = RewardModel(self.target, beside=host.model)
                return [f"scores with {self.target.name} on the policy's own base weights, which are in memory once"]
            except NotShared as why:
                notes = [f"scores with {self.target.name} on a copy of the base of its own, because {why}"]
        self.model = self._alone()
        return notes

    def _alone(self) -> RewardModel:
        from tunery.generate.score import RewardModel

        return RewardModel(self.target, dtype=self.config.dtype, device=self.config.device)

    def _check_shared(self, host: Host) -> None:
        """Raises NotShared where what was asked for needs weights of its own."""
        from tunery.models.parts import unwrap
        from tunery.models.shared_base import NotShared
        from tunery.models.target import has_biases

        base: Any = unwrap(host.model)
        dtype, device = str(base.dtype).removeprefix("torch."), self.config.device
        if host.changed is not None:
            raise NotShared(host.changed)
        if has_biases(self.target):
            raise NotShared("its adapter has biases of the base, which would become the policy's")
        if self.config.dtype not in ("auto", dtype):
            raise NotShared(f"it is to compute in {self.config.dtype} and the policy's base is in {dtype}")
        if device not in ("auto", str(base.device), base.device.type):
            raise NotShared(f"it is to run on {device} and the policy is on {base.device}")

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        self.model = self.model or self._alone()
        conversations = [[*answer.prompt, Message("assistant", answer.text)] for answer in answers]
        return [*self.model.score(conversations)]
