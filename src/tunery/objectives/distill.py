"""Distillation: the student's next-token distributions are brought near to a larger model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.kernels.divergence import Mixture, divergence, top_k_divergence
from tunery.objectives import sft
from tunery.objectives._generated import places, prompt_rows
from tunery.types import Batch, Example, Loss, Policy, Refused, Sample, Tokens


class Config(KindConfig):
    kind: str = "distill"
    teacher: str | None = Field(
        default=None,
        description="the model to learn from, with the same tokenizer: a run, adapter or model folder, or a hub name",
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

    top_k: int | None = Field(
        default=None, ge=1, description="in place of a teacher: learn from so many log-probs a token, kept in the rows"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.teacher is None) == (self.top_k is None):
            raise ValueError("teacher is required, the folder or the name of the model to learn from; or else top_k")
        if self.top_k is not None and (self.on_policy or self.temperature != 1.0):
            raise ValueError("top_k: what rows keep fits neither on_policy answers nor a temperature other than 1")
        return self


IDS, LOGPS = "teacher_id_", "teacher_logp_"  # of Tokens.extra, with the number of the token, from 0
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
    dtype, and takes the place of its weights in memory on every rank. With `top_k` there is none: each row has a column
    "teacher", {"ids": [[...], ...], "logps": [[...], ...]}, for each trained token in order the k tokens likeliest in
    its place and their log-probabilities; what is left goes to all other tokens together, as one event."""

    needs_rewards = False

    def __init__(self, config: Config):
        self.config = config
        self.teacher, self.generates = config.teacher, config.on_policy
        self.reads_columns = config.top_k is not None
        self.mixture = Mixture(BETAS.get(config.divergence, config.beta), config.temperature, config.sft_weight)
        self._answers = sft.Objective(sft.Config(train_on=config.train_on))

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        if self.generates:
            return prompt_rows(examples, template)
        made = self._answers.rows(examples, template)
        if self.config.top_k is None:
            return made
        return [
            row if isinstance(row, Refused) else _with_logps(row, example.meta.get("columns", {}), self.config.top_k)
            for row, example in zip(made, examples, strict=True)
        ]

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def judge(self, groups: Sequence[Sequence[Sample]]) -> dict[str, tuple[float, float]]:
        """Of a rollout there is nothing to say: each token has the teacher's opinion for its target."""
        return {}

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        rows, weight = batch.labelled_N, batch.weights_T.sum()
        targets_N, weights_N, student = batch.targets_T[rows], batch.weights_T[rows], policy.lazy_logits(batch)
        if self.config.top_k is None:
            made = divergence(student, policy.teacher_logits(batch), targets_N, weights_N, self.mixture)
        else:
            ids_NK, logps_NK = (
                torch.stack([batch.extra[f"{name}{k}"][rows] for k in range(self.config.top_k)], -1)
                for name in (IDS, LOGPS)
            )
            made = top_k_divergence(student, ids_NK.long(), logps_NK, targets_N, weights_N, self.mixture)
        metrics = {"loss": made.total.detach(), "divergence": made.divergence, "nll": made.nll}
        return Loss(made.total, {name: (value, weight) for name, value in metrics.items()})


def _with_logps(row: list[Tokens], columns: Any, top_k: int) -> list[Tokens] | Refused:
    """A row's sequence with what its column "teacher" says, beside the places that its tokens are predicted from."""
    if len(row) != 1:
        return Refused("several sequences", "the template makes several of this row, and its teacher spoke of one")
    tokens, given = row[0], columns.get("teacher")
    at = places(tokens)
    try:
        ids, logps = np.array(given["ids"]), np.array(given["logps"], dtype=np.float32)
        if ids.dtype.kind not in "iu":
            raise TypeError
    except (TypeError, KeyError, ValueError):
        return Refused("no teacher's log-probs", 'column "teacher" is not {"ids": [[...]], "logps": [[...]]}')
    if ids.shape != (len(at), top_k) or logps.shape != ids.shape:
        return Refused(
            "teacher's log-probs do not fit",
            f"they are {list(ids.shape)} ids and {list(logps.shape)} log-probs, expected {[len(at), top_k]}: trained "
            "tokens x objective.top_k",
        )
    wrong = not np.isfinite(logps).all() or (ids < 0).any() or (np.exp(logps).sum(-1) > 1.01).any()
    if wrong or (np.diff(np.sort(ids, -1), axis=-1) == 0).any():
        return Refused("teacher's log-probs are not probabilities", "not finite, an id twice, or a sum above 1")
    for k in range(top_k):
        for name, values in ((IDS, ids), (LOGPS, logps)):
            tokens.extra[f"{name}{k}"] = np.zeros(len(tokens), dtype=values.dtype)
            tokens.extra[f"{name}{k}"][at] = values[:, k]
    return row
