"""Supervised fine-tuning: the weighted negative log-likelihood of the answers' tokens, and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens


class Config(KindConfig):
    kind: str = "sft"
    train_on: Literal["answers", "last", "all"] = Field(
        "answers", description="every assistant turn, the last one only, or the prompt as well"
    )
    loss: Literal["nll", "dft"] = Field(
        "nll", description="dft weighs each token by the probability it has (dynamic fine-tuning)"
    )
    z_loss: float = Field(
        0.0, ge=0, description="adds this times logsumexp(logits)^2 of each token, to keep logits small (PaLM: 1e-4)"
    )


class Objective:
    """L = sum_t w_t * -log p(y_t | y_<t), with w_t = 0 outside the answers (Ouyang et al., arXiv:2203.02155).

    With `loss: dft` each term is weighed by p(y_t | y_<t), which gets no gradient: a token that the model finds
    unlikely pulls no longer the harder for it (dynamic fine-tuning, Wu et al., arXiv:2508.05629, eq. 9). `z_loss` adds
    c * sum_t w_t * log(sum_v exp z_tv)^2 (PaLM, Chowdhery et al., arXiv:2204.02311, section 5). With either, "nll" is
    the plain negative log-likelihood beside "loss"."""

    def __init__(self, config: Config):
        self.config = config

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        why = [_unfit(example) for example in examples]
        fit = [example for example, refused in zip(examples, why, strict=True) if refused is None]
        made = iter(template.encode_many(fit, train=self.config.train_on))
        return [refused or next(made) for refused in why]

    def unused(self, example: Example) -> str | None:
        """What of a usable row is not trained on, to be counted and said."""
        return "rows with a rejected answer, which objective sft does not use" if example.rejected else None

    def weight(self, batch: Batch) -> Tensor:
        return batch.weights_T.sum()

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        config, weight = self.config, batch.weights_T.sum()
        if config.loss == "nll" and not config.z_loss:
            nll = policy.nll(batch)
            return Loss(nll, {"loss": (nll.detach(), weight)})
        losses = policy.token_losses(batch, config.loss == "dft", config.z_loss)
        metrics = {"loss": (losses.total.detach(), weight), "nll": (losses.nll, weight)}
        if config.z_loss:
            metrics["z_loss"] = (config.z_loss * losses.squares, weight)
        return Loss(losses.total, metrics)


def _unfit(example: Example) -> Refused | None:
    """Why a row is not for this objective."""
    if example.text is not None:
        return Refused("wrong objective", "the row is plain text; objective: pretrain trains it")
    if example.label is False:
        return Refused(
            "thumbs down", "objective sft would train it as a good answer; leave out the rows with label false"
        )
    return None
