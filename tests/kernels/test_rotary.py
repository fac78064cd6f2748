"""Oracles: the formula by autograd in float64, a turn by hand, and the library's functions for Llama and Phi-3."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

from tunery.kernels.rotary import reference, rotary


def inputs(
    batch: int = 2, tokens: int = 5, depth: int = 8, width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as a model makes them, transposed views of [B, T, heads, D], and cos and sin."""
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, 4, depth, dtype=dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(batch, tokens, 2, depth, dtype=dtype).transpose(1, 2).requires_grad_()
    angle = torch.randn(batch, tokens, width // 2, dtype=torch.float64)
    angle = torch.cat((angle, angle), dim=-1)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def value_and_gradients(q: Tensor, k: Tensor, turned: tuple[Tensor, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in turned]
    return [*(t.detach() for t in turned), *torch.autograd.grad(turned, (q, k), upstream)]


@pytest.mark.parametrize(("depth", "width"), [(8, 8), (10, 6), (6, 2)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (1, 0)])
def test_value_and_gradients_equal_the_reference(batch, tokens, depth, width):
    q, k, cos, sin = inputs(batch, tokens, depth, width)
    mine = value_and_gradients(q, k, rotary(q, k, cos, sin))
    expected = value_and_gradients(q, k, (reference(q, cos, sin), reference(k, cos, sin)))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_any_cos_and_sin_are_differentiated_right():
    """Also where the two halves of cos and sin differ, so that the map is no rotation."""
    q, k, cos, sin = inputs(1, 2, 6, 4)
    cos, sin = cos + torch.rand_like(cos), sin + torch.rand_like(sin)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))


def test_by_hand():
    """The pair (1, 2), half a head apart, turned by 90 degrees is (-2, 1)."""
    q = torch.tensor([1.0, 7.0, 2.0, 9.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
    turned, _ = rotary(q, q, cos, sin)
    assert turned.flatten().tolist() == [-2.0, 7.0, 1.0, 9.0]


@pytest.mark.parametrize(("library", "width"), [(modeling_llama, 8), (modeling_phi3, 8), (modeling_phi3, 6)])
def test_the_librarys_functions(library, width):
    q, k, cos, sin = inputs(width=width, dtype=torch.float32)
    mine = value_and_gradients(q, k, rotary(q, k, cos, sin))
    expected = value_and_gradients(q, k, library.apply_rotary_pos_emb(q, k, cos, sin))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_cos_for_the_whole_batch():
    q, k, cos, sin = inputs(batch=3)
    mine = rotary(q, k, cos[:1], sin[:1])
    for a, b in zip(mine, rotary(q, k, cos[:1].expand(3, -1, -1), sin[:1].expand(3, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("angles", [torch.bfloat16, torch.float32])
def test_bfloat16_stays_near_float64(angles):
    q, k, cos, sin = inputs(tokens=50, depth=16, width=16, dtype=torch.bfloat16)
    cos, sin = cos.to(angles), sin.to(angles)
    mine = value_and_gradients(q, k, rotary(q, k, cos, sin))
    exact = value_and_gradients(q, k, (reference(q.double(), cos, sin), reference(k.double(), cos, sin)))
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2**-7


def test_the_layout_stays():
    """Transposed views come out as transposed views, so attention can view them as [T, heads, D] without a copy."""
    q, k, cos, sin = inputs()
    turned, _ = rotary(q, k, cos, sin)
    assert turned.stride() == q.stride() and turned.transpose(1, 2).is_contiguous()


def test_what_is_kept_for_the_backward():
    q, k, cos, sin = inputs(dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(q, k, cos, sin)
    assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_shapes_that_do_not_belong_together():
    q, k, cos, sin = inputs()
    for wrong in ((cos[:, 1:], sin[:, 1:]), (cos[..., 1:], sin[..., 1:]), (cos, sin[:1])):
        with pytest.raises(ValueError, match="rotary takes"):
            rotary(q, k, *wrong)


def test_the_gradient_has_no_gradient():
    q, k, cos, sin = inputs()
    upstream = torch.ones_like(q).requires_grad_()
    (dq,) = torch.autograd.grad(rotary(q, k, cos, sin)[0], q, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
