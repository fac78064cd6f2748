"""kto and bco. Oracles: numbers worked by hand, TRL's own loss on the same log-probs, one gradient for every cut of a
step, and a run that was not stopped."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tiny_models import tiny_model
from tiny_runs import model_folder
from tunery.config import build
from tunery.data.collate import collate
from tunery.data.loader import Cut, Step, make_step
from tunery.job import load_job
from tunery.loop import run_job
from tunery.objectives import bco, kto
from tunery.observe import observed, observes
from tunery.policy import CausalPolicy
from tunery.reference import Start
from tunery.thumbs import mismatched
from tunery.types import Batch, Example, Message, Refused, Tokens


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def answered(prompt: list[int], answer: list[int], label: bool = True) -> list[Tokens]:
    ids = np.array([*prompt, *answer], np.int32)
    weights = np.repeat([0.0, 1.0], [len(prompt), len(answer)]).astype(np.float32)
    return [Tokens(ids, weights, {"label": label})]


def drawn(lengths: list[tuple[int, int, bool]], seed: int = 0) -> list[list[Tokens]]:
    random = np.random.default_rng(seed)
    draw = [(random.integers(3, 131, p).tolist(), random.integers(3, 131, a).tolist(), up) for p, a, up in lengths]
    return [answered(*row) for row in draw]


EXAMPLES = [(9, 4, True), (12, 5, False), (7, 2, True), (5, 3, False)]


class Given:
    """A policy that says what it is given, [T], of itself and its reference."""

    def __init__(self, logps_T: torch.Tensor, reference_T: torch.Tensor):
        self.logps_T, self.reference_T = logps_T, reference_T

    def logps(self, batch: Batch) -> torch.Tensor:
        return self.logps_T

    def reference_logps(self, batch: Batch) -> torch.Tensor:
        return self.reference_T


def given(ratios: list[float], labels: list[bool]) -> tuple[Batch, Given]:
    """Answers of two tokens whose log-ratios to the reference are these; log p of each is -2."""
    batch = collate([t for label in labels for t in answered([5, 6, 7], [8, 9], label)], list(range(len(labels))))
    logps_T = torch.where(batch.weights_T != 0, -1.0, 0.0).double()
    halves_N = torch.tensor(ratios, dtype=torch.float64).repeat_interleave(2) / 2
    reference_T = logps_T.clone()
    reference_T[batch.labelled_N] -= halves_N
    return batch, Given(logps_T, reference_T)


def test_kto_by_hand():
    batch, policy = given([3.0, -1.0], [True, False])
    objective = kto.Objective(kto.Config(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0, sft_weight=0.1))
    objective.take_in({"kl": (2.0, 2.0)})  # z = 1
    loss = objective.loss(policy, batch)
    up, down = 1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(1.0))  # 1 - s(0.5 (3 - 1)), 1 - s(0.5 (1 - -1))
    assert float(loss.sum) == pytest.approx(2 * up + 3 * down + 0.1 * 1.0)
    got = {name: float(value) / float(weight) for name, (value, weight) in loss.metrics.items()}
    assert got["kl"] == 1.0 and got["rewards/chosen"] == 1.5 and got["rewards/rejected"] == -0.5
    assert got["rewards/accuracies"] == 1.0 and got["nll/chosen"] == 1.0 and got["logps/chosen"] == -2.0


def test_a_negative_distance_is_none_and_nobody_elses_answer_is_none():
    objective = kto.Objective(kto.Config())
    objective.take_in({"kl": (-4.0, 2.0)})
    assert objective.z == 0.0
    objective.take_in({"kl": (4.0, 2.0)})
    objective.take_in({})
    assert objective.z == 0.0


def test_apo_zero_by_hand():
    batch, policy = given([3.0, -1.0], [True, False])
    objective = kto.Objective(kto.Config(beta=0.5, loss="apo_zero"))
    assert objective.observe is None and objective.companions is None
    loss = float(objective.loss(policy, batch).sum)
    assert loss == pytest.approx(1 / (1 + math.exp(1.5)) + 1 / (1 + math.exp(0.5)))


def test_bco_by_hand():
    """Rewards 1.5 and -0.5: their mean is 0.5; of a second step's 0.5 and 0.5, with the first, it is 0.5 as well."""
    batch, policy = given([3.0, -1.0], [True, False])
    objective = bco.Objective(bco.Config(beta=0.5))
    objective.take_in({name: (float(v), float(w)) for name, (v, w) in objective.observe(policy, batch).items()})
    assert float(objective.loss(policy, batch).sum) == pytest.approx(2 * softplus(-1.0))
    assert objective.rewards_seen == (1.0, 2.0)
    assert observes(objective) and not observes(objective, training=False)
    again = bco.Objective(bco.Config(beta=0.5))
    again.load_state(json.loads(json.dumps(objective.state())))
    assert again.rewards_seen == objective.rewards_seen


def test_each_prompt_meets_the_answer_before():
    examples = [answered([1, 2], [3]), answered([4, 5, 6], [7, 8]), answered([9, 10], [11, 12, 13])]
    made = mismatched(examples)
    assert [tokens.ids.tolist() for (tokens,) in made] == [[1, 2, 11, 12, 13], [4, 5, 6, 3], [9, 10, 7, 8]]
    assert [tokens.weights.tolist() for (tokens,) in made] == [[0, 0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert mismatched(examples[:1]) == []
    cut = mismatched([answered([1, 2, 3, 4], [5]), answered([6], [7, 8, 9])], longest=3)  # rows of 5 do not fit either
    assert [tokens.ids.tolist() for (tokens,) in cut] == [[1, 2, 3, 4, 7], [6, 5]]
    assert [tokens.weights.tolist() for (tokens,) in cut] == [[0, 0, 0, 0, 1], [0, 1]]


@pytest.mark.parametrize("max_length", [64, 1024])
def test_a_long_prompt_with_a_long_answer_stays_within_the_context(tmp_path, max_length):
    """GPT-2 has no positions beyond its context, which each row here fits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = model_folder(tmp_path / "model")
    (model / "model.safetensors").unlink()
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(str(model))
    rows = [
        {"prompt": "1 " * (20 if i % 2 else 1), "completion": "2 " * (1 if i % 2 else 20), "label": bool(i % 2)}
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "model": {"name": str(model), "dtype": "float32"}, "objective": "kto", "adapter": "full",
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": max_length, "cache": False},
        "train": {"batch_size": 4, "max_steps": 2}, "output": str(tmp_path / "run"),
    }  # fmt: skip
    assert run_job(load_job(values)).step == 2


def test_trls_kto_loss():
    """TRL's KTOTrainer._compute_loss on the same numbers: a trainer's attributes without a trainer, and models that
    return their log-probs."""
    trl = pytest.importorskip("trl")
    batch = collate([tokens for example in drawn(EXAMPLES) for tokens in example], [0, 1, 2, 3])
    torch.manual_seed(0)
    policy_T, reference_T, kl_T, kl_reference_T = (
        torch.where(batch.weights_T != 0, -3 * torch.rand(batch.n_tokens, dtype=torch.float64), 0.0) for _ in range(4)
    )
    kl_T = kl_T + 0.7 * (batch.weights_T != 0)  # so that the distance is above 0
    policy_T.requires_grad_()
    config = kto.Config(beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    width, ends = max(batch.lengths), batch.cu_seqlens.tolist()

    def padded(values_T: torch.Tensor) -> torch.Tensor:
        rows = [values_T[a:b] for a, b in itertools.pairwise(ends)]
        return torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])

    mask = padded(batch.weights_T)[:, :-1]

    class Model(nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, values: torch.Tensor):
            super().__init__()
            self.values = values

        def forward(self, **_: Any) -> Any:
            nothing = torch.zeros_like(mask)
            log_probs = padded(self.values)[:, :-1] * mask
            return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    kl_of = {id(policy_T): kl_T, id(reference_T): kl_reference_T}
    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        model=Model(policy_T), ref_model=Model(reference_T), precompute_ref_logps=False, calculate_KL=True,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same), aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), loss_type="kto", beta=config.beta,
        desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, _: batch.per_sequence(kl_of[id(model.values)]),
    )  # fmt: skip
    completion = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    labels = batch.extra["label"]
    inputs = {
        "input_ids": completion, "completion_mask": completion, "attention_mask": torch.ones_like(completion),
        "label": labels,
    }  # fmt: skip
    theirs = trl.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    objective = kto.Objective(config)
    z = (batch.per_sequence(kl_T) - batch.per_sequence(kl_reference_T)).mean()
    assert float(z) > 0
    objective.take_in({"kl": (float(z) * 4, 4.0)})
    mine = objective.loss(Given(policy_T, reference_T), batch).sum / 4
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=0, atol=1e-6)
    grads = [torch.autograd.grad(loss, policy_T)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- rows


class Spaces:
    """A template with a token a word: 'a' trains what comes after the last user turn."""

    def encode_many(self, examples: list[Example], train: str = "answers") -> list[Any]:
        assert train == "last"
        made = []
        for example in examples:
            words = [(len(word), m.role == "assistant") for m in example.messages for word in m.content.split()]
            ids, weights = zip(*words, strict=True)
            made.append([Tokens(np.array(ids, np.int32), np.array(weights, np.float32))])
        return made


def test_rows_need_a_thumb():
    turns = [Message("user", "aa bb"), Message("assistant", "c")]
    rows = kto.Objective(kto.Config()).rows(
        [Example(turns, label=True), Example(turns), Example(turns, label=False), Example(text="x")], Spaces()
    )
    assert [tokens.extra["label"] for i in (0, 2) for tokens in rows[i]] == [True, False]
    assert isinstance(rows[1], Refused) and rows[1].reason == "no thumb"
    assert isinstance(rows[3], Refused) and rows[3].reason == "wrong objective"


# ---------------------------------------------------------------- invariances, with a real model


@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_a_step_is_the_same_however_it_is_cut(kind):
    """float64: one stream, several, one a sequence, and two ranks, whose observations are summed."""
    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    policy = CausalPolicy(model, dtype=torch.float64)
    policy.at_start = Start(dict(model.named_parameters()), start)
    examples, engine = drawn(EXAMPLES, seed=2), SimpleNamespace(device=torch.device("cpu"))
    ways = [[Cut(1000)], [Cut(20)], [Cut(1000, packing=False)], [Cut(30, rank=0, world=2), Cut(30, rank=1, world=2)]]
    found = []
    for way in ways:
        objective: Any = build("objectives", load_job({"objective": kind}).objective)
        steps = [make_step(examples, [0, 1, 2, 3], how) for how in way]
        sums: dict[str, tuple[float, float]] = {}
        for step in steps:
            for name, (value, weight) in observed(objective, policy, model, step, engine).items():  # type: ignore
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + value, before[1] + weight)
        objective.take_in(sums)
        found.append(gradient(objective, policy, steps))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-10)
        for mine, expected in zip(grads, found[0][1], strict=True):
            assert (mine - expected).abs().max() <= 1e-12 * expected.abs().max()


def gradient(objective: Any, policy: CausalPolicy, steps: list[Step]) -> tuple[float, list[torch.Tensor]]:
    policy.model.zero_grad(set_to_none=True)
    total, weight = 0.0, 0.0
    for batch in [batch for step in steps for batch in step.micro]:
        loss = objective.loss(policy, batch).sum
        loss.backward()
        total, weight = total + loss.item(), weight + float(objective.weight(batch))
    assert weight == 4.0
    return total, [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_runs_evaluate_and_go_on_where_they_stopped(tmp_path, kind):
    """Four steps at once, or the last two from the checkpoint of the second: the same losses, to the bit."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": answer}], "label": up}
        for i in range(9)
        for answer, up in ((f"{i}", True), ("No, I will not.", False))
    ]
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("\n".join(map(json.dumps, rows[:12])))
    held.write_text("\n".join(map(json.dumps, rows[12:])))

    def job(output: str, resume: Any = True) -> Any:
        values = {
            "model": "builtin:tiny", "objective": kind, "optimizer": {"lr": 1e-3}, "output": str(tmp_path / output),
            "data": {"train": str(train), "eval": str(held), "max_length": 128, "cache": False},
            "train": {"batch_size": 5, "max_steps": 4, "log_every": 1, "save_every": 1, "keep": 9, "resume": resume},
            "eval": {"every": 2, "best": False}, "schedule": {"kind": "constant", "warmup": 0},
        }  # fmt: skip
        return load_job(values)

    run_job(job("whole"))
    run_job(job("rest", resume=str(tmp_path / "whole/checkpoint-2")))
    whole, rest = (log(tmp_path / name) for name in ("whole", "rest"))
    assert len([row for row in whole if "eval_loss" in row]) == 3
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, rest)]
    assert len(losses[0]) == 4 and losses[0][2:] == losses[1]


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
