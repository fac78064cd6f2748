"""Oracles: the formula by autograd in float64, a value by hand, and the library's MLPs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from tunery.kernels.swiglu import gated, reference

ACTIVATIONS = ("silu", "gelu_tanh")


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and an upstream gradient."""
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    return gate.mul_(3).requires_grad_(), up.requires_grad_(), dy


def assert_same(mine: Tensor, expected: Tensor, gate: Tensor, up: Tensor, dy: Tensor, tolerance: float) -> None:
    """The values, and the gradients of gate and up."""
    results = [[y, *torch.autograd.grad(y, (gate, up), dy)] for y in (mine, expected)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 33), (1, 1), (0, 8)])
def test_value_and_gradients_equal_the_reference(activation, shape):
    gate, up, dy = inputs(*shape)
    mine, expected = gated(gate, up, activation), reference(gate, up, activation)
    assert_same(mine, expected, gate, up, dy, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_numerically_right(activation):
    gate, up, _ = inputs(3, 5)
    assert torch.autograd.gradcheck(gated, (gate, up, activation))


def test_by_hand():
    """silu(ln 3) = ln 3 * 3/4, because sigmoid(ln 3) = 3/4."""
    gate = torch.tensor([math.log(3.0)], dtype=torch.float64)
    torch.testing.assert_close(gated(gate, torch.tensor([4.0], dtype=torch.float64)), 3 * gate)


@pytest.mark.parametrize(("activation", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_the_librarys_activations(activation, name):
    gate, up, dy = inputs(9, 24, dtype=torch.float32)
    mine, expected = gated(gate, up, activation), ACT2FN[name](gate) * up
    assert_same(mine, expected, gate, up, dy, 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_stays_near_float64(activation):
    gate, up, dy = inputs(32, 64, dtype=torch.bfloat16)
    mine = gated(gate, up, activation)
    exact = reference(gate.double(), up.double(), activation)
    results = [[y.detach(), *torch.autograd.grad(y, (gate, up), dy.to(y.dtype))] for y in (mine, exact)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2**-6


def test_halves_of_one_projection():
    """Phi-3 makes gate and up in one product; its halves are views that are not contiguous."""
    both = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gate, up = both.chunk(2, dim=-1)
    results = [(y, torch.autograd.grad(y.sum(), both)[0]) for y in (gated(gate, up), reference(gate, up))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", ["gate", "up"])
def test_one_of_the_two_may_be_a_constant(trains):
    gate, up, dy = inputs(3, 4)
    (up if trains == "gate" else gate).requires_grad_(False)
    leaf = gate if trains == "gate" else up
    mine, expected = (torch.autograd.grad(f(gate, up), leaf, dy)[0] for f in (gated, reference))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_what_is_kept_and_what_is_written():
    """Gate and up alone are kept, and the backward writes over none of the caller's tensors."""
    gate, up, dy = inputs(6, 8, dtype=torch.bfloat16)
    before = [t.detach().clone() for t in (gate, up, dy)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gated(gate, up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
    y.backward(dy)
    for tensor, copy in zip((gate, up, dy), before, strict=True):
        assert torch.equal(tensor, copy)


def test_shapes_and_dtypes_that_differ():
    gate, up, _ = inputs(3, 4)
    for wrong in (up[:1], up.float()):
        with pytest.raises(ValueError, match="one shape and dtype"):
            gated(gate, wrong)


def test_the_gradient_has_no_gradient():
    gate, up, dy = inputs(3, 4)
    (dup,) = torch.autograd.grad(gated(gate, up), up, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dup.sum().backward()
