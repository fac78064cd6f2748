"""Oracle: cross-entropy by hand from the model's logits; which tokens are trained is the templates' test."""

from __future__ import annotations

import pytest
import torch

from tiny_models import random_sequences, reference_loss, tiny_model
from tunery.config import build, load_kind
from tunery.data.collate import collate
from tunery.policy import CausalPolicy
from tunery.types import Example, Message


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_loss_is_the_weighted_sum_and_metrics_add_up(kind):
    model = tiny_model().eval()
    objective = build("objectives", load_kind("objectives", kind).Config())
    policy = CausalPolicy(model, dtype=torch.float64)
    sequences = random_sequences()
    whole = objective.loss(policy, collate(sequences))
    torch.testing.assert_close(whole.sum, reference_loss(model, sequences), rtol=1e-9, atol=1e-9)
    parts = [objective.loss(policy, collate([s])).metrics["loss"] for s in sequences]
    value, weight = whole.metrics["loss"]
    torch.testing.assert_close(value, torch.stack([p[0] for p in parts]).sum())
    torch.testing.assert_close(weight, torch.stack([p[1] for p in parts]).sum())
    assert not value.requires_grad
    expected = sum(float(s.weights[1:].sum()) for s in sequences)
    assert float(objective.weight(collate(sequences))) == pytest.approx(expected)


class Template:
    """Says which examples came, and in which order."""

    def encode_many(self, examples, train):
        return [[example.messages[-1].content] for example in examples]

    def encode_texts(self, examples, append_eos):
        return [[example.text] for example in examples]


def chat(answer: str, **more) -> Example:
    return Example([Message("user", "q"), Message("assistant", answer)], **more)


def test_each_objective_refuses_the_rows_that_are_for_another():
    rows = [chat("a"), chat("b", label=False), Example(text="t"), chat("c", label=True), chat("d", rejected=[])]
    trained, down, text, *others = (
        load_kind("objectives", "sft").Objective(load_kind("objectives", "sft").Config()).rows(rows, Template())
    )
    assert [trained, *others] == [["a"], ["c"], ["d"]]
    assert down.reason == "thumbs down" and text.reason == "wrong objective" and "objective: pretrain" in text.detail
    module = load_kind("objectives", "pretrain")
    refused, made = module.Objective(module.Config()).rows([chat("a"), Example(text="t")], Template())
    assert made == ["t"] and refused.reason == "wrong objective" and "objective: sft" in refused.detail


def test_sft_says_that_it_does_not_use_the_rejected_answer():
    module = load_kind("objectives", "sft")
    pair = chat("a", rejected=[Message("assistant", "b")])
    assert (
        module.Objective(module.Config()).unused(pair)
        == "rows with a rejected answer, which objective sft does not use"
    )
    assert module.Objective(module.Config()).unused(chat("a")) is None
