"""Binary classifier optimisation: from thumbs up and down, a classifier whose logit is the reward.

    L = -log s(beta r - d)   for a wanted answer,   -log s(d - beta r)   for an unwanted one    Jung et al.,
                                                                            arXiv:2404.04656, eq. 10 and section 3.2
r = log pi(y|x) - log ref(y|x), summed over the answer's tokens; s is the logistic function; d, the reward shift, is the
mean of all rewards beta r seen so far in training, this step's among them, and gets no gradient. (The paper's
reweighting of prompts by a density ratio is not here.) Losses are summed over answers; a step's weight is their
number. For pairs there is `dpo` with `loss: bco_pair` as well, which is the same with both answers in one step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tunery.config import KindConfig
from tunery.pairs import sequence_logps, unused_spans
from tunery.thumbs import LABEL, Metrics, count_sequences, encode_thumbs, thumb_metrics
from tunery.types import Batch, Loss, Policy


class Config(KindConfig):
    kind: str = "bco"
    beta: float = Field(0.1, gt=0, description="how strongly the policy is kept to the reference")
    reference: Literal["auto", "live", "cached"] = Field(
        "auto",
        description="the reference's log-probs: live (a forward of the starting weights beside each of the policy's) "
        "or cached (all of them in one pass before the first step); auto: cached, but live with data.streaming",
    )


class Objective:
    """sum over answers of L."""

    reference = True
    only_training = True  # what an evaluation sees is not remembered

    rows, weight = staticmethod(encode_thumbs), staticmethod(count_sequences)
    unused = staticmethod(partial(unused_spans, objective="bco"))

    def __init__(self, config: Config):
        self.config = config
        self.rewards_seen = (0.0, 0.0)  # sum and number

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        wanted_S, logps_T = batch.extra[LABEL].bool(), policy.logps(batch)
        rewards_S = self._rewards(policy, batch, logps_T)
        total, count = self.rewards_seen
        shift = total / count if count else 0.0
        logits_S = rewards_S - shift
        loss = -F.logsigmoid(torch.where(wanted_S, logits_S, -logits_S)).sum()
        number = float(batch.n_sequences)
        metrics = thumb_metrics(rewards_S.detach(), sequence_logps(batch, logps_T), wanted_S)
        return Loss(loss, {"loss": (loss.detach(), number), "delta": (shift * number, number), **metrics})

    def _rewards(self, policy: Policy, batch: Batch, logps_T: Tensor) -> Tensor:
        return self.config.beta * sequence_logps(batch, logps_T - policy.reference_logps(batch))

    # ------------------------------------------------------------ d, a number of all steps so far

    def observe(self, policy: Policy, batch: Batch) -> Metrics:
        return {"rewards": (self._rewards(policy, batch, policy.logps(batch)).sum(), float(batch.n_sequences))}

    def take_in(self, seen: Mapping[str, tuple[float, float]]) -> None:
        total, count = seen.get("rewards", (0.0, 0.0))
        self.rewards_seen = (self.rewards_seen[0] + total, self.rewards_seen[1] + count)

    def state(self) -> dict[str, Any]:
        return {"rewards_seen": list(self.rewards_seen)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        total, count = state["rewards_seen"]
        self.rewards_seen = (total, count)
