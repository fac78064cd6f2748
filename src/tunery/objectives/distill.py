"""Distillation: the student's next-token distributions are brought near to a larger model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.kernels.divergence import Mixture, divergence
from tunery.objectives import sft
from tunery.objectives._generated import prompt_rows
from tunery.types import Batch, Example, Loss, Policy, Refused, Sample, Tokens


class Config(KindConfig):
    kind: str = "distill"
    teacher: str | None = Field(
        default=None, description="the model to learn from, with the same tokenizer; a folder or a name"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="KL(teacher || student), KL(student || teacher), or what lies between"
    )
    beta: float = Field(default=0.5, gt=0, lt=1, description="of jsd: near 0 as the forward KL, near 1 as the reverse")
    temperature: float = Field(default=1.0, gt=0, description="divides both models' logits before they are compared")
    sft_weight: float = Field(default=0.0, ge=0, description="adds this times the answers' negative log-likelihood")
    train_on: Literal["answers", "last", "all"] = Field(
        default="answers", description="every assistant turn, the last one only, or the prompt as well"
    )
    on_policy: bool = Field(
        default=False, description="on answers that the student gives while it learns (rollout:), not those of the data"
    )

    @field_validator("teacher")
    @classmethod
    def _named(cls, value: str | None) -> str:
        if not value:
            raise ValueError("teacher is required: the folder or the name of the model to learn from")
        return value


BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


class Objective:
    """L = sum_t w_t (D(q(. | y_<t), p(. | y_<t)) + sft_weight * -log p(y_t | y_<t)), with w_t = 0 outside the answers,
    p the student's probabilities and q the teacher's.

    D is the forward KL of Hinton et al. (arXiv:1503.02531), the reverse one (Gu et al., arXiv:2306.08543), or the
    generalised Jensen-Shannon divergence of GKD (Agarwal et al., arXiv:2306.13649, eq. 1), between softmaxes at
    `temperature`. As in GKD, and other than in Hinton's, it is not multiplied by temperature^2, which a gradient loses
    by it. With `on_policy` the answers y are the student's own, sampled as `rollout` says (GKD, algorithm 1, with
    lambda = 1; no gradient is taken of the sampling); rewards are measured where there are any, and train nothing.

    Neither matrix of logits ever exists as a whole (kernels/divergence.py). The teacher is frozen, in the arithmetic's
    dtype, and takes the place of its weights in memory on every rank."""

    needs_rewards = False

    def __init__(self, config: Config):
        self.config = config
        self.teacher, self.generates = config.teacher, config.on_policy
        self.mixture = Mixture(BETAS.get(config.divergence, config.beta), config.temperature, config.sft_weight)
        self._answers = sft.Objective(sft.Config(train_on=config.train_on))

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        return prompt_rows(examples, template) if self.generates else self._answers.rows(examples, template)

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def judge(self, groups: Sequence[Sequence[Sample]]) -> dict[str, tuple[float, float]]:
        """Of a rollout there is nothing to say: each token has the teacher's opinion for its target."""
        return {}

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        rows, weight = batch.labelled_N, batch.weights_T.sum()
        made = divergence(
            policy.lazy_logits(batch), policy.teacher_logits(batch), batch.targets_T[rows], batch.weights_T[rows],
            self.mixture,
        )  # fmt: skip
        metrics = {"loss": made.total.detach(), "divergence": made.divergence, "nll": made.nll}
        return Loss(made.total, {name: (value, weight) for name, value in metrics.items()})
