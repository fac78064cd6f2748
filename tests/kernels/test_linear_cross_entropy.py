"""Oracle: the unchunked forward with autograd, in float64, and F.cross_entropy by hand."""

from __future__ import annotations

import pytest
import torch

from tunery.kernels import linear_cross_entropy as kernel
from tunery.kernels.linear_cross_entropy import linear_cross_entropy, reference


def inputs(n: int = 37, v: int = 53, h: int = 16, dtype: torch.dtype = torch.float64, bias: bool = False) -> list:
    torch.manual_seed(0)
    h_NH = torch.randn(n, h, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, requires_grad=True)
    b = torch.randn(v, dtype=dtype, requires_grad=True) if bias else None
    return [h_NH, weight, torch.randint(0, v, (n,)), torch.rand(n) * 2, b]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 3.0)])
def test_value_and_gradients_equal_the_reference(monkeypatch, bias, scale, softcap):
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", {"cpu": 53 * 5})  # several chunks, the last one not full
    results = []
    for function in (linear_cross_entropy, reference):
        h, w, y, weights, b = inputs(bias=bias)
        loss = function(h, w, y, weights, b, scale, softcap)
        (loss * 0.7).backward()
        results.append((loss, h.grad, w.grad, b.grad if bias else torch.zeros(1)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


def test_by_hand():
    """Two classes, logits (0, ln 3): p = (1/4, 3/4); loss = 2 * -ln(1/4); dz = 2 * (1/4 - 1, 3/4)."""
    h = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]], dtype=torch.float64).log().clamp_min(0).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.tensor([0]), torch.tensor([2.0]))
    loss.backward()
    torch.testing.assert_close(loss, 2 * torch.tensor(4.0, dtype=torch.float64).log())
    torch.testing.assert_close(weight.grad, torch.tensor([[-1.5], [1.5]], dtype=torch.float64))


def test_no_labelled_rows_give_a_zero_with_zero_gradients():
    h, w, y, weights, _ = inputs(n=0)
    loss = linear_cross_entropy(h, w, y, weights)
    loss.backward()
    assert loss == 0 and h.grad.shape == (0, 16) and not w.grad.any()


def test_without_gradients_none_are_made():
    h, w, y, weights, _ = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(h, w, y, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*inputs()[:4]).detach())


def test_a_frozen_head_gets_no_gradient():
    h, w, y, weights, _ = inputs()
    w.requires_grad_(False)
    linear_cross_entropy(h, w, y, weights).backward()
    assert w.grad is None and h.grad.abs().sum() > 0


def test_bfloat16_stays_near_float32():
    h, w, y, weights, _ = inputs(n=64, v=200, h=64, dtype=torch.float32)
    exact = linear_cross_entropy(h, w, y, weights)
    rough = linear_cross_entropy(h.detach().bfloat16(), w.detach().bfloat16(), y, weights)
    assert rough.dtype == torch.float32
    assert abs(float(rough - exact)) / float(exact) < 0.01
