"""Supervised fine-tuning: the weighted negative log-likelihood of the answers' tokens, and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.objectives._experts import load_balance
from tunery.types import Batch, Example, Loss, Policy, Refused, Tokens


class Config(KindConfig):
    kind: str = "sft"
    train_on: Literal["answers", "last", "all"] = Field(
        default="answers", description="every assistant turn, the last one only, or the prompt as well"
    )
    loss: Literal["nll", "dft"] = Field(
        default="nll", description="dft weighs each token by the probability it has (dynamic fine-tuning)"
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="adds this times logsumexp(logits)^2 of each token, to keep logits small (PaLM: 1e-4)",
    )
    balance_loss: float = Field(
        default=0.0,
        ge=0,
        description="of a mixture of experts: adds this times the loss that keeps experts in use (0.001)",
    )


class Objective:
    """L = sum_t w_t * -log p(y_t | y_<t), with w_t = 0 outside the answers (Ouyang et al., arXiv:2203.02155).

    With `loss: dft` each term is weighed by p(y_t | y_<t), which gets no gradient: a token that the model finds
    unlikely pulls no longer the harder for it (dynamic fine-tuning, Wu et al., arXiv:2508.05629, eq. 9). `z_loss` adds
    c * sum_t w_t * log(sum_v exp z_tv)^2 (PaLM, Chowdhery et al., arXiv:2204.02311, section 5). With any of
    these, "nll" is the plain negative log-likelihood beside "loss".

    `balance_loss` adds a * sum_t w_t * B to each stream's loss, B being Switch's balance of it (_experts.py). B is a
    product of two means over a stream's tokens, and so, other than all else here, it is not quite the same when a step
    is cut into other streams. "experts/<i>" is the share of the choices that expert i got, over all layers."""

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
        if config.loss == "nll" and not config.z_loss and not config.balance_loss:
            nll = policy.nll(batch)
            return Loss(nll, {"loss": (nll.detach(), weight)})
        shares: dict[str, tuple[Tensor, Tensor]] = {}
        with policy.routing() if config.balance_loss else nullcontext([]) as routers:
            losses = policy.token_losses(batch, config.loss == "dft", config.z_loss)
        total = losses.total
        if config.balance_loss:
            balance, chosen_E = load_balance(routers, policy.experts_per_token)
            total = total + config.balance_loss * weight * balance
            shares = {f"experts/{i}": (count, chosen_E.sum()) for i, count in enumerate(chosen_E)}
            shares["balance"] = (balance.detach() * weight, weight)
        metrics = {"loss": (total.detach(), weight), "nll": (losses.nll, weight), **shares}
        if config.z_loss:
            metrics["z_loss"] = (config.z_loss * losses.squares, weight)
        return Loss(total, metrics)


def _unfit(example: Example) -> Refused | None:
    """Why a row is not for this objective."""
    if example.text is not None:
        return Refused("wrong objective", "the row is plain text; objective: pretrain trains it")
    if example.label is False:
        return Refused(
            "thumbs down", "objective sft would train it as a good answer; leave out the rows with label false"
        )
    return None
