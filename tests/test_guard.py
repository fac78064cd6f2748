"""Oracle: models broken in a known place."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_models import random_sequences, tiny_model
from tunery import guard
from tunery.data.collate import collate
from tunery.errors import TuneryError
from tunery.objectives import sft
from tunery.policy import CausalPolicy


def found(model, batches):
    policy = CausalPolicy(model, dtype=torch.float64)
    return guard.investigate(model, sft.Objective(sft.Config()), policy, batches, lambda: None)


class Exploding(torch.nn.Module):
    """Finite forward, infinite gradient: sqrt at 0."""

    def forward(self, x):
        return x + torch.sqrt(x * 0)


def test_the_first_module_the_parameter_and_the_gradient_are_told_apart():
    batches = [collate(random_sequences((5,)), [0]), collate(random_sequences((7, 3)), [4, 2])]
    healthy = found(tiny_model(), batches)
    assert [f.module for f in healthy] == [None, None] and healthy[1].rows == [2, 4]

    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: torch.full_like(_[2], math.nan))
    assert [(f.module, f.where) for f in found(model, batches)] == [("model.layers.1.mlp", "output")] * 2

    model = tiny_model()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = math.inf
    assert found(model, batches)[0].module == "model.layers.0.self_attn.v_proj.weight"

    model = tiny_model()
    model.model.layers[1].input_layernorm = torch.nn.Sequential(model.model.layers[1].input_layernorm, Exploding())
    first = found(model, batches)[0]
    assert first.where == "gradient" and "layers.1.input_layernorm" in first.module


def test_the_model_is_left_without_gradients_and_hooks():
    model = tiny_model()
    found(model, [collate(random_sequences())])
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_kept_failure_comes_back(tmp_path):
    batch = collate(random_sequences(), [3, 1, 4, 1])
    finding = guard.Finding(0, math.nan, "model.x", "output", [1, 3])
    guard.keep_failure(tmp_path, 4, [([finding], [guard.as_dict(batch)])], {1: "f:2", 3: "f:9"})
    record, ((again,),) = guard.load_failure(tmp_path)
    assert record["step"] == 4 and record["origins"]["3"] == "f:9"
    assert again.ids_T.equal(batch.ids_T) and again.rows == batch.rows and again.labelled_N.equal(batch.labelled_N)
    with pytest.raises(TuneryError, match="no failure to replay"):
        guard.load_failure(tmp_path / "elsewhere")


def test_the_message_says_step_rows_and_what_to_do(tmp_path):
    finding = guard.Finding(0, math.nan, "model.x", "output", list(range(6)))
    text = guard.explain(5, [finding], {0: "rows.jsonl:1"}, tmp_path)
    assert "step 5" in text and "rows.jsonl:1" in text and "2 more" in text and "tunery replay" in text
    overflow = guard.explain(5, [guard.Finding(0, 1.0, None, "", [0])], {}, tmp_path)
    assert "every stream is finite alone" in overflow


@pytest.mark.parametrize(("numbers", "threads"), [(100, 1), (1 << 17, 2)])
def test_small_tensors_are_updated_by_one_thread(numbers, threads):
    """And the others are there again afterwards."""
    seen = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer = Optimizer([torch.zeros(numbers, requires_grad=True)], lr=1.0)
        guard.Gate(optimizer, torch.device("cpu")).step(torch.zeros(()))
        assert seen == [threads] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
