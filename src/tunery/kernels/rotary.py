"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), with the two coordinates of a pair half a head
apart, as Llama, Qwen, Mistral, Gemma and Phi-3 have it:

    a' = a cos - b sin,     b' = b cos + a sin          for (a, b) = (x[i], x[i + R/2]), i < R/2

The gradient is the transposed rotation, by the negative angle, so nothing but cos and sin is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.backends import runs_compiled, runs_triton


def rotary(q: Tensor, k: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """q [B, heads, T, D] and k [B, kv heads, T, D] turned by the angles of cos and sin [B or 1, T, R], R even.

    R < D is a partial rotation: the last D - R coordinates stay. Each result has its input's dtype (the library's has
    the dtype that it and cos promote to; its cos has the model's) and its memory layout, so transposed views
    [B, T, heads, D] cost no copy. cos and sin are constants. `compiled` asks for compiled.py's form on a CPU (in
    bfloat16 and float32). Differentiable once. Raises ValueError for shapes that do not belong together."""
    for x in (q, k):
        batch, _, tokens, depth = x.shape
        width = cos_BTR.shape[-1]
        fits = cos_BTR.shape[:2] in ((1, tokens), (batch, tokens)) and width <= depth and width % 2 == 0
        if not fits or sin_BTR.shape != cos_BTR.shape:
            shapes = f"x {tuple(x.shape)}, cos {tuple(cos_BTR.shape)}, sin {tuple(sin_BTR.shape)}"
            raise ValueError(f"rotary takes x [B, heads, T, D], cos and sin [B or 1, T, R], R even, <= D, not {shapes}")
    return _Rotary.apply(q, k, cos_BTR, sin_BTR, compiled)


def reference(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """The same for one of q and k the obvious way, gradients by autograd."""
    cos, sin = cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.compiled = compiled
        return _form(q, cos, compiled)(q, cos, sin, False), _form(k, cos, compiled)(k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = (
            _form(dy, cos, ctx.compiled)(dy, cos, sin, True) if needed else None
            for dy, needed in zip(grads, ctx.needs_input_grad[:2], strict=True)
        )
        return dq, dk, None, None, None


def _form(x: Tensor, cos: Tensor, compiled: bool) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """What turns x, by its device and dtype."""
    if runs_triton(x):
        from tunery.kernels import triton_rotary

        return triton_rotary.turn
    if compiled and runs_compiled(x, cos):
        from tunery.kernels import compiled as kernels

        return kernels.turn
    return _turn


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x turned by the angles, or by the transposed rotation (`back`), in torch operations."""
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
