"""orpo, simpo and cpo. Oracles: numbers worked by hand, TRL's own losses on the same log-probs, and one gradient for
every cut of a step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import tiny_model
from tunery.config import build
from tunery.data.collate import collate
from tunery.data.loader import Cut, cut
from tunery.errors import ConfigError
from tunery.job import load_job
from tunery.objectives import cpo, orpo, simpo
from tunery.policy import CausalPolicy
from tunery.types import Batch, Tokens

KINDS: dict[str, Any] = {"orpo": orpo, "simpo": simpo, "cpo": cpo}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


class Given:
    """A policy that says what it is given, [T]."""

    def __init__(self, logps_T: torch.Tensor):
        self.logps_T = logps_T

    def logps(self, batch: Batch) -> torch.Tensor:
        return self.logps_T


def answers(lengths: list[tuple[int, ...]], seed: int = 0) -> list[list[Tokens]]:
    """For each (prompt, answer, answer) two sequences with these numbers of tokens."""
    random = np.random.default_rng(seed)
    made = []
    for prompt, *each in lengths:
        head = random.integers(3, 131, prompt)
        made.append(
            [
                Tokens(
                    np.concatenate([head, random.integers(3, 131, n)]).astype(np.int32),
                    np.repeat([0.0, 1.0], [prompt, n]).astype(np.float32),
                )
                for n in each
            ]
        )
    return made


def one_pair(kind: str, **options: Any) -> float:
    """log p(chosen) = -1 over 2 tokens, log p(rejected) = -6 over 4: means -0.5 and -1.5."""
    batch = collate([tokens for pair in answers([(5, 2, 4)]) for tokens in pair], [0, 0])
    logps_T = torch.zeros(batch.n_tokens, dtype=torch.float64)
    logps_T[batch.labelled_N] = torch.tensor([-0.25, -0.75, -1, -2, -1.5, -1.5], dtype=torch.float64)
    objective = KINDS[kind].Objective(KINDS[kind].Config(**options))
    return float(objective.loss(Given(logps_T), batch).sum)


def test_by_hand():
    odds = -0.5 - math.log(1 - math.exp(-0.5)) + 1.5 + math.log(1 - math.exp(-1.5))
    assert one_pair("orpo", beta=0.2) == pytest.approx(0.5 + 0.2 * softplus(-odds))
    assert one_pair("simpo", beta=2.0, gamma=1.0) == pytest.approx(softplus(-(2 * 1 - 1)))
    assert one_pair("simpo", beta=2.0, gamma=1.0, sft_weight=3) == pytest.approx(softplus(-1) + 3 * 0.5)
    assert one_pair("simpo", gamma=0.5, label_smoothing=0.1) == pytest.approx(softplus(-1.5) + 0.1 * 1.5)
    assert one_pair("cpo", beta=0.1) == pytest.approx(softplus(-0.5) + 0.5)
    assert one_pair("cpo", beta=0.1, loss="hinge", sft_weight=0) == pytest.approx(0.5)
    assert one_pair("cpo", beta=0.25, loss="ipo", sft_weight=0) == pytest.approx((1 - 2) ** 2)
    assert one_pair("cpo", beta=0.1, label_smoothing=0.25) == pytest.approx(softplus(-0.5) + 0.25 * 0.5 + 0.5)


def test_an_answer_that_is_certain_has_finite_odds():
    logps = torch.tensor([0.0, -1e-30, -200.0, 1e-9], dtype=torch.float64, requires_grad=True)
    odds = orpo.log_odds(logps)
    odds.sum().backward()
    assert odds.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()
    assert float(odds.detach()[2]) == pytest.approx(-200.0)


TRL = [
    ("orpo", {"beta": 0.3}),
    ("simpo", {"beta": 1.7, "gamma": 0.9}),
    ("simpo", {"beta": 1.7, "gamma": 0.9, "label_smoothing": 0.2}),
    ("cpo", {"beta": 0.3, "sft_weight": 0.0}),
    ("cpo", {"beta": 0.3, "sft_weight": 0.0, "label_smoothing": 0.2}),
    ("cpo", {"beta": 0.3, "sft_weight": 0.0, "loss": "hinge"}),
    ("cpo", {"beta": 0.3, "sft_weight": 0.0, "loss": "ipo"}),
]


@pytest.mark.parametrize(("kind", "options"), TRL, ids=str)
def test_trls_preference_terms(kind, options):
    """TRL's terms of the pairs alone: its fine-tuning terms are means over a batch's tokens (see the docstrings)."""
    pytest.importorskip("trl")
    batch = collate([t for pair in answers([(9, 4, 3), (12, 5, 6), (7, 2, 4)]) for t in pair], [0, 0, 1, 1, 2, 2])
    torch.manual_seed(0)
    logps_T = torch.where(batch.weights_T != 0, -0.1 - 2 * torch.rand(batch.n_tokens, dtype=torch.float64), 0.0)
    sums_S = batch.per_sequence(logps_T)
    means_S = sums_S / batch.labelled_S
    config = KINDS[kind].Config(**options)
    mine = KINDS[kind].Objective(config).loss(Given(logps_T), batch)
    trainer = SimpleNamespace(
        beta=config.beta, accelerator=SimpleNamespace(device="cpu"), alpha=0.0, simpo_gamma=getattr(config, "gamma", 0),
        label_smoothing=getattr(config, "label_smoothing", 0), loss_type=getattr(config, "loss", kind),
    )  # fmt: skip
    if kind == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        # its first line casts to float32; 64 bits pass through a tensor whose `float` does nothing
        chosen, rejected = (values.as_subclass(Wide) for values in (means_S[0::2], means_S[1::2]))
        losses, *_, log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
        theirs = -means_S[0::2].sum() - losses.sum()
        value, weight = mine.metrics["log_odds_ratio"]
        assert float(value) / weight == pytest.approx(float(log_odds), abs=1e-6)
    else:
        from trl.experimental.cpo import CPOTrainer

        by_mean = kind == "simpo" or config.loss == "ipo"
        values_S = means_S if by_mean else sums_S
        losses, *_ = CPOTrainer.cpo_loss(trainer, values_S[0::2], values_S[1::2])  # type: ignore[arg-type]
        theirs = losses.sum()
    torch.testing.assert_close(mine.sum, torch.as_tensor(theirs), rtol=0, atol=1e-6, check_dtype=False)
    assert mine.metrics["loss"][1] == 3.0 and mine.metrics["rewards/accuracies"][1] == 3.0


class Wide(torch.Tensor):
    def float(self, *_: Any, **__: Any) -> Any:
        return self


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_same_however_it_is_cut(kind):
    """float64: one stream, several, one a pair, two ranks, shared prompts."""
    policy = CausalPolicy(tiny_model(), dtype=torch.float64)
    objective = build("objectives", load_job({"objective": kind}).objective)
    pairs, rows = answers([(20, 4, 3), (12, 5, 6), (17, 2, 4)], seed=4), [0, 1, 2]
    ways = [[Cut(1000)], [Cut(40)], [Cut(1000, packing=False)], [Cut(30, rank=0, world=2), Cut(30, rank=1, world=2)]]
    found = [gradient(objective, policy, [b for how in way for b in cut(pairs, rows, how)]) for way in ways]
    shared = collate([t for pair in pairs for t in pair], [0, 0, 1, 1, 2, 2], share=True)
    assert len(shared.lengths) == 9
    found.append(gradient(objective, policy, [shared]))
    for number, (loss, grads) in enumerate(found[1:], start=1):
        assert loss == pytest.approx(found[0][0], rel=1e-10)
        near = 1e-7 if number == 4 else 1e-12  # the library's norm is float32: gradients meet there that did not
        for mine, expected in zip(grads, found[0][1], strict=True):
            assert (mine - expected).abs().max() <= near * expected.abs().max()


def gradient(objective: Any, policy: CausalPolicy, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = objective.loss(policy, batch).sum
        loss.backward()
        total += loss.item()
    assert sum(float(objective.weight(batch)) for batch in batches) == 3.0
    return total, [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"kind": "cpo", "loss": "ipo", "label_smoothing": 0.1}, "not for ipo"),
        ({"kind": "simpo", "beta": 0}, "beta"),
        ({"kind": "orpo", "gamma": 1}, "gamma"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(objective, said):
    with pytest.raises(ConfigError, match=said):
        load_job({"objective": objective})
