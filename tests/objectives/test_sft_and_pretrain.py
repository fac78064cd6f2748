"""Oracle: cross-entropy by hand from the model's logits; which tokens are trained is the templates' test."""

from __future__ import annotations

import pytest
import torch

from tiny_models import random_sequences, reference_loss, tiny_model
from tunery.config import build, load_kind
from tunery.data.collate import collate
from tunery.policy import CausalPolicy


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
