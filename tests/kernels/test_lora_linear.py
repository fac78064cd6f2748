"""Projection groups with low-rank updates. Oracles: the formula by autograd, and PEFT's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tunery.kernels import compiled, swiglu
from tunery.kernels.lora import Projection, gated_lora_linear, lora_linear, reference

needs_compiler = pytest.mark.skipif(not compiled.available(), reason="needs Linux and a C++ compiler")


def group(sizes, rank=3, inside=10, dtype=torch.float64, bias=True):
    torch.manual_seed(1)
    return [
        Projection(
            torch.randn(out, inside, dtype=dtype),
            torch.randn(out, dtype=dtype) if bias and i % 2 == 0 else None,
            torch.randn(rank + i, inside, dtype=dtype).requires_grad_(),
            torch.randn(out, rank + i, dtype=dtype).requires_grad_(),
            0.5 + i,
        )
        for i, out in enumerate(sizes)
    ]


def gradients(outputs, x, projections):
    torch.manual_seed(2)
    total = sum((y * torch.randn_like(y)).sum() for y in outputs)
    wanted = [t for p in projections for t in (p.A, p.B)] + ([x] if x.requires_grad else [])
    return torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("shape", [(7, 10), (1, 7, 10), (2, 3, 10), (0, 10)], ids=str)
@pytest.mark.parametrize("sizes", [[6], [6, 4, 4], [12, 12]], ids=str)
def test_value_and_gradient_equal_the_formula(sizes, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    projections = group(sizes)
    ours, theirs = lora_linear(x, projections), reference(x, projections)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(ours, x, projections), gradients(theirs, x, projections), rtol=1e-12, atol=1e-12
    )


def test_an_input_without_gradient_gets_none():
    x, projections = torch.randn(5, 10, dtype=torch.float64), group([4, 4])
    ours = gradients(lora_linear(x, projections), x, projections)
    torch.testing.assert_close(ours, gradients(reference(x, projections), x, projections))


def test_x_is_kept_once_for_the_group():
    x, projections = torch.randn(50, 10, dtype=torch.float64, requires_grad=True), group([6, 4, 4])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, projections)
    of_stream = [t for t in kept if t.shape[0] == 50]
    assert sorted(t.shape[1] for t in of_stream) == [10, 3 + 4 + 5]


@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 10), (0, 10)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_of_a_gated_activation(activation, shape):
    gate, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (projection,) = group([6])
    outcomes = []
    for y in (
        gated_lora_linear(gate, up, projection, activation),
        reference(swiglu.reference(gate, up, activation), [projection])[0],
    ):
        torch.manual_seed(2)
        grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), [gate, up, projection.A, projection.B])
        outcomes.append([y, *grads])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_compiler)])
def test_of_a_gated_activation_in_bfloat16_as_the_two_apart(native):
    """Under autocast, as in training: to the bit what the activation and the layer give one after the other."""
    torch.manual_seed(0)
    gate, up = (torch.randn(40, 64).to(torch.bfloat16).requires_grad_() for _ in range(2))
    p = Projection(
        torch.randn(48, 64).to(torch.bfloat16), None, torch.randn(4, 64).requires_grad_(),
        torch.randn(48, 4).requires_grad_(), 2.0,
    )  # fmt: skip
    dy = torch.randn(40, 48).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        joined = gated_lora_linear(gate, up, p, "silu", native)
        (apart,) = lora_linear(swiglu.gated(gate, up, "silu", native), [p])
    for a, b in zip(*([y, *torch.autograd.grad(y, [gate, up, p.A, p.B], dy)] for y in (joined, apart)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_gated_activation_is_not_kept():
    gate, up = (torch.randn(50, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (projection,) = group([6])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gated_lora_linear(gate, up, projection, "silu")
    of_stream = [t for t in kept if t.shape[0] == 50]
    assert sorted(t.shape[1] for t in of_stream) == [3, 10, 10]
    before = [t.detach().clone() for t in (gate, up)]
    y.sum().backward()
    assert all(torch.equal(t, copy) for t, copy in zip((gate, up), before, strict=True))


def test_a_trained_weight_beneath_is_refused():
    projections = group([4])
    projections[0].weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(torch.randn(2, 10, dtype=torch.float64), projections)
    with pytest.raises(ValueError, match="frozen"):
        gated_lora_linear(*torch.randn(2, 2, 10, dtype=torch.float64), projections[0], "silu")


def test_bfloat16_under_autocast_is_as_near_to_float32_as_peft():
    """The base in bfloat16, A and B in float32, as in training. Oracle: PEFT's forward, and float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), LoraConfig(r=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.base_layer.to(torch.bfloat16)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(200, 64).to(torch.bfloat16).requires_grad_()
    base = layer.base_layer
    projection = Projection(base.weight, base.bias, A, B, layer.scaling["default"])
    upstream = torch.randn(200, 48)

    def outcome(run, x):
        y = run(x)
        return [y, *torch.autograd.grad((y * upstream.to(y.dtype)).sum(), [x, A, B])]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, pefts = outcome(lambda x: lora_linear(x, [projection])[0], x), outcome(layer, x)
    exact = outcome(lambda x: reference(x, [projection])[0], x.detach().double().requires_grad_())
    for mine, theirs, true in zip(ours, pefts, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (mine, theirs))
        assert error <= 1.5 * allowed
