"""Objectives that go by a number of a whole step, such as KTO's distance from the reference or BCO's mean reward: it is
taken before the losses, without a gradient and without dropout, over all streams and ranks, so that a step is the same
however it is cut.

Such an objective has `observe(policy, batch) -> {name: (sum, weight)}`, of each of the step's streams, and
`take_in({name: (sum, weight)})`, called with the sums over all of them. Where it has
`companions(examples, longest) -> examples` as well, these further sequences, of `longest` tokens at most (None: any),
are observed instead of the step's own. One that says `only_training` goes by what it saw in training, and is shown
nothing in an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tunery.data.loader import Step, cut
from tunery.engine import Engine
from tunery.types import Objective, Policy

Sums = dict[str, tuple[float, float]]


def observes(objective: Objective, training: bool = True) -> bool:
    """Whether the objective is to be shown a step before its losses."""
    there = getattr(objective, "observe", None) is not None
    return there and (training or not getattr(objective, "only_training", False))


def observed(objective: Any, policy: Policy, model: torch.nn.Module, step: Step, engine: Engine) -> Sums:
    """What `objective` observes of this rank's share of a step: sums over its streams."""
    companions = getattr(objective, "companions", None)
    streams = step.micro
    if companions is not None:
        examples = companions(step.examples, policy.longest)
        streams = cut(examples, step.rows, step.how) if examples else []
    sums: Sums = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in streams:
                for name, (value, weight) in objective.observe(policy, batch.to(engine.device)).items():
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = (before[0] + float(value), before[1] + float(weight))
    finally:
        model.train(was_training)
    return sums


def state_of(objective: Any) -> dict[str, Any] | None:
    """What an objective has to remember from step to step, for the checkpoint; None where that is nothing."""
    state = getattr(objective, "state", None)
    return None if state is None else state()


def put_back(objective: Any, state: Mapping[str, Any] | None) -> None:
    if state is not None:
        objective.load_state(state)
