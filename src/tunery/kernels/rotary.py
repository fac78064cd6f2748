"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the two coordinates of a pair half a head
apart, as Llama, Qwen, Mistral, Gemma and Phi-3 have it:

    a' = a cos - b sin,     b' = b cos + a sin          for (a, b) = (x[i], x[i + R/2]), i < R/2

The gradient is the transposed rotation, by the negative angle, so nothing but cos and sin is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.triton_support import runs_triton


def rotary(q: Tensor, k: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, heads, T, D] and k [B, kv heads, T, D] turned by the angles of cos and sin [B or 1, T, R], R even.

    R < D is a partial rotation: the last D - R coordinates stay. Each result has its input's dtype (the library's has
    the dtype that it and cos promote to; its cos has the model's) and its memory layout, so transposed views
    [B, T, heads, D] cost no copy. cos and sin are constants. Differentiable once."""
    return _Rotary.apply(q, k, cos_BTR, sin_BTR)


def reference(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """The same for one of q and k the obvious way, gradients by autograd."""
    cos, sin = cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, cos, sin, back=False), _turn(k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        needs = zip(grads, ctx.needs_input_grad, strict=False)
        return (*[_turn(dy, cos, sin, back=True) if needed else None for dy, needed in needs], None, None)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x turned by the angles, or by the transposed rotation."""
    if runs_triton(x):
        from tunery.kernels import triton_rotary

        return triton_rotary.turn(x, cos, sin, back)
    width = cos.shape[-1]
    half = width // 2
    wide = torch.promote_types(x.dtype, cos.dtype)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x_turned = x[..., :width].to(wide)
    y = torch.empty_like(x, dtype=wide)
    torch.mul(x_turned, cos, out=y[..., :width])
    # In the transposed rotation the two sines change places and signs (and most often they are equal).
    sin_a, sin_b = sin.split(half, dim=-1)
    if back:
        sin_a, sin_b = -sin_b, -sin_a
    y[..., :half].addcmul_(x_turned[..., half:], sin_a, value=-1)
    y[..., half:width].addcmul_(x_turned[..., :half], sin_b)
    if width < x.shape[-1]:
        y[..., width:] = x[..., width:]
    return y.to(x.dtype)
