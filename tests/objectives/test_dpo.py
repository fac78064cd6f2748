"""Oracles: numbers worked by hand, TRL's own loss on the same log-probs, and the definition of each invariance."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tiny_models import tiny_model
from tunery.data.collate import collate
from tunery.data.loader import Cut, cut
from tunery.errors import ConfigError
from tunery.job import load_job
from tunery.objectives.dpo import LOSSES, Config, Objective, Pairs
from tunery.policy import CausalPolicy
from tunery.types import Tokens

SMOOTHED = {"robust": {"label_smoothing": 0.2}, "exo_pair": {"label_smoothing": 0.2}}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_pair(name: str, **options) -> float:
    """The loss of r_w = 3 over 2 tokens, r_l = -1 over 4 tokens, beta = 0.5: h = 4, beta h = 2, hbar = 1.75."""
    pairs = Pairs(*(torch.tensor([x], dtype=torch.float64) for x in (3.0, -1.0, 2.0, 4.0)))
    return float(LOSSES[name](pairs, Config(loss=name, **{"beta": 0.5, **SMOOTHED.get(name, {}), **options})))


BY_HAND = {
    "sigmoid": 0.12692801104297252,  # log(1 + e^-2)
    "hinge": 0.0,  # 1 - 2 < 0
    "ipo": 0.5625,  # (1.75 - 1)^2
    "sigmoid_norm": math.log(1 + math.exp(-0.875)),
    "robust": (0.8 * 0.12692801104297252 - 0.2 * 2.12692801104297252) / 0.6,
    "exo_pair": sigmoid(2) * (-0.12692801104 - math.log(0.8)) + sigmoid(-2) * (-2.12692801104 - math.log(0.2)),
    "nca_pair": 0.2014132779827524 + 0.5 * 1.7014132779827524 + 0.5 * 0.47407698418010663,
    "bco_pair": 0.2014132779827524 + 0.47407698418010663,  # log(1 + e^-1.5) + log(1 + e^-0.5)
    "sppo_hard": 4.0,  # (3 - 1)^2 + (-1 + 1)^2
    "discopop": math.exp(-2),  # sigmoid(2 / 0.05) = 1 to 17 digits
    "apo_zero": 1 - sigmoid(1.5) + sigmoid(-0.5),
    "apo_down": sigmoid(1.5) + 1 - sigmoid(2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_by_hand(name):
    assert one_pair(name) == pytest.approx(BY_HAND[name], abs=1e-8)


def test_options_by_hand():
    assert one_pair("hinge", beta=0.1) == pytest.approx(0.6)
    assert one_pair("sigmoid", label_smoothing=0.25) == pytest.approx(0.12692801104297252 + 0.25 * 2)  # cDPO
    cold = one_pair("discopop", discopop_tau=2.0)  # m = sigmoid(1)
    assert cold == pytest.approx(0.12692801104 * (1 - sigmoid(1)) + math.exp(-2) * sigmoid(1))
    shifted = Pairs(*(torch.tensor([x]) for x in (3.0, -1.0, 2.0, 4.0)), shift=0.5)
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1))
    assert float(LOSSES["bco_pair"](shifted, Config(beta=0.5))) == pytest.approx(expected)


# ---------------------------------------------------------------- the whole objective, on given log-probs


class Given:
    """A policy that says what it is given: log-probs [T] of the policy and of its reference."""

    def __init__(self, logps_T: torch.Tensor, reference_T: torch.Tensor):
        self.logps_T, self.reference_T = logps_T, reference_T

    def logps(self, batch):
        return self.logps_T

    def reference_logps(self, batch):
        return self.reference_T


LENGTHS = [(9, 4, 3), (12, 5, 6), (7, 2, 4)]  # prompt, chosen, rejected


def pair_tokens(lengths=LENGTHS, seed: int = 0, vocabulary: int = 131) -> list[list[Tokens]]:
    random = np.random.default_rng(seed)
    pairs = []
    for prompt, *answers in lengths:
        head = random.integers(3, vocabulary, prompt)
        pair = []
        for answer in answers:
            ids = np.concatenate([head, random.integers(3, vocabulary, answer)]).astype(np.int32)
            pair.append(Tokens(ids, np.repeat([0.0, 1.0], [prompt, answer]).astype(np.float32)))
        pairs.append(pair)
    return pairs


def given(seed: int = 1):
    pairs = pair_tokens()
    batch = collate([tokens for pair in pairs for tokens in pair], [i for i in range(3) for _ in "cr"])
    torch.manual_seed(seed)
    draws = [-torch.rand(batch.n_tokens, dtype=torch.float64) * 3 for _ in range(2)]
    logps, reference = (torch.where(batch.weights_T != 0, draw, 0.0) for draw in draws)
    return batch, Given(logps.requires_grad_(), reference)


def trl_loss(batch, policy: Given, config: Config) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss on the same numbers: a trainer's attributes without a trainer, and models that
    return their log-probs."""
    trl = pytest.importorskip("trl")
    ends = batch.cu_seqlens.tolist()
    order = [*range(0, batch.n_sequences, 2), *range(1, batch.n_sequences, 2)]
    width = max(batch.lengths)

    def padded(values_T: torch.Tensor) -> torch.Tensor:
        rows = [values_T[ends[i] : ends[i + 1]] for i in order]
        return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])

    mask = padded(batch.weights_T)[:, :-1]  # of targets; TRL's is of the tokens themselves

    class Model(nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, **_):
            nothing = torch.zeros_like(mask)
            return SimpleNamespace(
                log_probs=padded(self.values)[:, :-1] * mask,
                entropy=nothing,
                mean_logits=nothing,
                is_top1=nothing.bool(),
            )

    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        model=Model(policy.logps_T), ref_model=Model(policy.reference_T), precompute_ref_logps=False,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=config.discopop_tau),
        ld_alpha=config.ld_alpha, f_divergence_type="reverse_kl", loss_types=config.loss,
        loss_weights=config.loss_weights or [1.0] * len(config.loss), beta=config.beta, use_weighting=False,
        label_smoothing=config.label_smoothing, _metrics={"train": defaultdict(list)}, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    completion = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    inputs = {"input_ids": completion, "completion_mask": completion, "attention_mask": torch.ones_like(completion)}
    return trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("name", LOSSES)
def test_trls_loss_and_gradient(name):
    batch, policy = given()
    config = Config(loss=name, beta=0.3, **SMOOTHED.get(name, {}))
    check_against_trl(batch, policy, config)


def test_trls_loss_with_ld_alpha_and_with_several_losses():
    batch, policy = given()
    check_against_trl(batch, policy, Config(beta=0.3, ld_alpha=0.4))
    check_against_trl(batch, policy, Config(loss=["sigmoid", "bco_pair", "ipo"], loss_weights=[0.8, 0.2, 0.5]))


def check_against_trl(batch, policy, config):
    loss = Objective(config).loss(policy, batch)
    theirs, metrics = trl_loss(batch, policy, config)
    (mine_grad,) = torch.autograd.grad(loss.sum / 3, policy.logps_T)
    (their_grad,) = torch.autograd.grad(theirs, policy.logps_T)
    torch.testing.assert_close(loss.sum.detach() / 3, theirs.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mine_grad, their_grad, rtol=0, atol=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        value, weight = loss.metrics[name]
        assert float(value) / weight == pytest.approx(metrics[name][0], abs=1e-6), name


def test_the_sft_term_is_a_mean_over_each_chosen_answer():
    batch, policy = given()
    plain = Objective(Config()).loss(policy, batch).sum
    more = Objective(Config(sft_weight=0.5)).loss(policy, batch)
    sums = batch.per_sequence(policy.logps_T)[0::2]
    by_hand = -(sums[0] / 4 + sums[1] / 5 + sums[2] / 2).detach()
    torch.testing.assert_close(more.sum.detach(), plain.detach() + 0.5 * by_hand)
    assert float(more.metrics["nll/chosen"][0]) == pytest.approx(float(by_hand)) and more.metrics["loss"][1] == 3.0


def test_ld_alpha_counts_the_tokens_beyond_the_shorter_answer_less():
    """Answers of 4 and 3, 5 and 6, 2 and 4 tokens: 1 beyond of the first chosen, 1 and 2 of the others' rejected."""
    batch, _ = given()
    ones = torch.where(batch.weights_T != 0, 1.0, 0.0)
    objective = Objective(Config(ld_alpha=0.25))
    pairs = objective._pairs(Given(ones, torch.zeros_like(ones)), batch, ones)
    assert pairs.chosen_P.tolist() == [3.25, 5.0, 2.0] and pairs.rejected_P.tolist() == [3.0, 5.25, 2.5]


def test_bcos_shift_is_the_mean_of_all_rewards_seen():
    batch, policy = given()
    objective = Objective(Config(loss="bco_pair", beta=0.3))
    ratios = batch.per_sequence(policy.logps_T - policy.reference_T) * 0.3
    for count in (1, 2):  # the same step twice has the same mean
        seen = objective.observe(policy, batch)
        objective.take_in({name: (value.item(), weight) for name, (value, weight) in seen.items()})
        assert objective.rewards_seen[1] == 6 * count
        shift = ratios.mean()
        expected = torch.nn.functional.softplus(-(ratios[0::2] - shift)) + torch.nn.functional.softplus(
            ratios[1::2] - shift
        )
        torch.testing.assert_close(objective.loss(policy, batch).sum, expected.sum())
    again = Objective(Config(loss="bco_pair", beta=0.3))
    again.load_state(objective.state())
    assert again.rewards_seen == objective.rewards_seen
    assert Objective(Config()).observe is None


def test_without_a_reference_the_answers_are_compared_as_they_are():
    batch, policy = given()
    objective = Objective(Config(reference="none"))
    assert not objective.reference and Objective(Config()).reference
    logps = batch.per_sequence(policy.logps_T)
    expected = torch.nn.functional.softplus(-0.1 * (logps[0::2] - logps[1::2])).sum()
    torch.testing.assert_close(objective.loss(policy, batch).sum, expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": ["sigmoid", "sigmoid"]}, "one twice"),
        ({"loss": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "not for hinge"),
        ({"loss": "exo_pair"}, "exo_pair needs one above 0"),
        ({"loss": "apo_zero", "reference": "none"}, "nothing to go by"),
        ({"loss": "kto_pair"}, "loss"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        load_job({"objective": {"kind": "dpo", **options}})


# ---------------------------------------------------------------- invariances, with a real model


@pytest.mark.parametrize("options", [{}, {"loss": "ipo", "sft_weight": 0.3}, {"ld_alpha": 0.5}], ids=str)
def test_a_step_is_the_same_however_it_is_cut(options):
    """float64: one stream, one a pair, several, over two ranks, and with the prompts shared, all give one gradient."""
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    policy = CausalPolicy(model, dtype=torch.float64)
    from tunery.reference import Start

    policy.at_start = Start(dict(model.named_parameters()), start)
    objective, pairs = Objective(Config(**options)), pair_tokens(seed=4)
    found = []
    cuts = [Cut(1000), Cut(40), Cut(1000, packing=False)]
    for how in [*([one] for one in cuts), [Cut(30, rank=0, world=2), Cut(30, rank=1, world=2)]]:
        found.append(gradient(objective, policy, [b for one in how for b in cut(pairs, [0, 1, 2], one)]))
    found.append(gradient(objective, policy, [collate([t for p in pairs for t in p], [0, 0, 1, 1, 2, 2], share=True)]))
    assert found[0][0] != pytest.approx(math.log(2) * 3, rel=1e-4)
    for number, (loss, grads) in enumerate(found[1:]):
        assert loss == pytest.approx(found[0][0], rel=1e-10)
        near = 1e-7 if number == 3 else 1e-13  # the library's norm is float32: gradients meet there that did not
        for mine, expected in zip(grads, found[0][1], strict=True):
            assert (mine - expected).abs().max() <= near * expected.abs().max()


def gradient(objective, policy, batches):
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = objective.loss(policy, batch).sum
        loss.backward()
        total += loss.item()
    assert sum(float(objective.weight(batch)) for batch in batches) == 3.0
    return total, [p.grad.clone() for p in policy.model.parameters()]
