"""Oracles: the formula by autograd in float64, hand-worked numbers, and the library's own norm modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tunery.kernels.rms_norm import add_rms_norm, reference, rms_norm

EPS = 1e-5


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, residual, weight and an upstream gradient."""
    torch.manual_seed(seed)
    sizes = (shape, shape, shape[-1:], shape)
    x, residual, weight, dy = (torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)
    return [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), dy]


def grads(y: Tensor, dy: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, dy))


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 33), (2, 3, 4, 6), (1, 1), (0, 8)])
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False), (0.5, True)])
def test_value_and_gradients_equal_the_reference(shape, offset, cast_first):
    x, _, weight, dy = inputs(*shape)
    mine, expected = (f(x, weight, EPS, offset, cast_first) for f in (rms_norm, reference))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(grads(mine, dy, x, weight), grads(expected, dy, x, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
def test_with_the_residual_added(offset, cast_first):
    x, residual, weight, dy = inputs(4, 9)
    h = x + residual
    expected = (reference(h, weight, EPS, offset, cast_first), h)
    mine = add_rms_norm(x, residual, weight, EPS, offset, cast_first)
    results = []
    for y, h in (mine, expected):
        results.append([y, h, *grads((y * dy).sum() + (h**3).sum(), torch.ones(()), x, residual, weight)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_numerically_right():
    x, residual, weight, _ = inputs(3, 5)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, 1.0, False), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (x, residual, weight))


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_may_go_unused(used):
    x, residual, weight, dy = inputs(4, 6)
    expected = (reference(x + residual, weight, EPS), x + residual)
    mine = grads(add_rms_norm(x, residual, weight, EPS)[used], dy, x, residual)
    for a, b in zip(mine, grads(expected[used], dy, x, residual), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_by_hand():
    """x = (3, 4): mean square 12.5; with eps 12.5, rstd = 1/5. d y0 / d x = rstd - x x0 rstd^3 / 2."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, torch.tensor([1.0, 10.0], dtype=torch.float64), 12.5)
    torch.testing.assert_close(y, torch.tensor([[0.6, 8.0]], dtype=torch.float64))
    y[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.2 - 4.5 / 125, -6 / 125]], dtype=torch.float64))


@pytest.mark.parametrize(("kind", "offset", "cast_first"), [(LlamaRMSNorm, 0.0, True), (Gemma2RMSNorm, 1.0, False)])
@pytest.mark.parametrize("shape", [(11, 48), (2, 5, 3, 16)])
def test_the_librarys_modules(kind, offset, cast_first, shape):
    x, _, weight, dy = inputs(*shape, dtype=torch.float32)
    module = kind(shape[-1], eps=EPS)
    module.weight = torch.nn.Parameter(weight.detach())
    expected = module(x)
    mine = rms_norm(x, weight, EPS, offset, cast_first)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    pairs = zip(grads(mine, dy, x, weight), grads(expected, dy, x, module.weight), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_the_norm_of_queries():
    """Qwen 3 norms each head of [B, T, heads, D] by itself."""
    x, _, weight, _ = inputs(2, 5, 4, 16, dtype=torch.float32)
    module = Qwen3RMSNorm(16, eps=EPS)
    module.weight = torch.nn.Parameter(weight.detach())
    torch.testing.assert_close(rms_norm(x, weight, EPS), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "offset", "cast_first"), [(LlamaRMSNorm, 0.0, True), (Gemma2RMSNorm, 1.0, False)])
def test_bfloat16_rounds_where_the_library_does(kind, offset, cast_first, weight_dtype):
    x, _, weight, dy = inputs(16, 64, dtype=torch.bfloat16)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    module = kind(64, eps=EPS)
    module.weight = torch.nn.Parameter(weight.detach())
    expected = module(x)
    mine = rms_norm(x, weight, EPS, offset, cast_first)
    assert mine.dtype == expected.dtype
    # Statistics added up in another order may move a rounding here and there.
    torch.testing.assert_close(mine, expected, rtol=2**-7, atol=0)
    assert (mine != expected).float().mean() < 0.01
    exact = reference(x.double(), weight.double(), EPS, offset, cast_first)
    results = ([y.detach(), *grads(y, dy.to(y.dtype), x, weight)] for y in (mine, exact))
    for a, b in zip(*results, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2**-7


def test_what_is_kept_for_the_backward():
    x, residual, weight, _ = inputs(6, 32, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
        assert [(t.shape, t.dtype) for t in kept] == [
            ((6, 32), torch.bfloat16),
            ((32,), torch.bfloat16),
            ((6, 1), torch.float32),
        ]
        assert kept[0].data_ptr() == x.data_ptr()
        kept.clear()
        _, h = add_rms_norm(x, residual, weight, EPS)
        assert [t.data_ptr() for t in kept[:2]] == [h.data_ptr(), weight.data_ptr()] and len(kept) == 3


def test_frozen_weights_get_no_gradient():
    x, _, weight, dy = inputs(4, 8)
    weight.requires_grad_(False)
    rms_norm(x, weight, EPS).backward(dy)
    assert weight.grad is None and x.grad is not None


def test_shapes_that_do_not_belong_together():
    x, residual, weight, _ = inputs(4, 8)
    with pytest.raises(ValueError, match=r"residual \(3, 8\)"):
        add_rms_norm(x, residual[:3], weight, EPS)
    with pytest.raises(ValueError, match=r"weight \(7,\)"):
        rms_norm(x, weight[:7], EPS)


def test_the_gradient_has_no_gradient():
    x, _, weight, dy = inputs(4, 8)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS), x, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
