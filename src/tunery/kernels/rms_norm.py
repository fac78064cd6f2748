"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), optionally with the residual addition before it.

    y = x * rstd * (weight + offset),     rstd = 1 / sqrt(mean(x^2) + eps)

with the statistics in float32 or wider. Autograd through the library's form keeps three or four matrices alive, two of
them in float32; here only x, the weight and one number a row are kept. With g = dy * (weight + offset) and
x' = x * rstd:

    dx = rstd * (g - x' * mean(g * x')),     dweight = sum over rows of dy * x'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.backends import runs_compiled, runs_triton


def rms_norm(
    x_TH: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True, compiled: bool = False
) -> Tensor:
    """x normalised over its last dimension, which may follow any others ([..., H], or [..., heads, D] for the norms of
    Qwen 3's queries and keys).

    `cast_first` is the library's Llama norm: x * rstd is rounded to x's dtype, then multiplied by the weight, so the
    result has the dtype that x's and the weight's promote to. Otherwise it is Gemma's (with `offset` 1): everything in
    float32, rounded once, to x's dtype. `compiled` asks for compiled.py's form on a CPU (in bfloat16 and float32).
    Differentiable once. Raises ValueError for shapes that do not belong together."""
    _check(x_TH, x_TH, weight_H)
    return _RMSNorm.apply(x_TH, None, weight_H, eps, offset, cast_first, compiled)[0]


def add_rms_norm(
    x_TH: Tensor,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). The sum is rounded to its dtype before it is normalised, as it is when
    the two are written apart."""
    _check(x_TH, residual_TH, weight_H)
    return _RMSNorm.apply(x_TH, residual_TH, weight_H, eps, offset, cast_first, compiled)


def reference(x_TH: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """The same the obvious way, gradients by autograd."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    x = x_TH.to(wide)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight_H + offset) * normed.to(x_TH.dtype)
    return (normed * (weight_H.to(wide) + offset)).to(x_TH.dtype)


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        shapes = f"x {tuple(x.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"rms_norm takes x and residual [..., H] and weight [H], not {shapes}")


class _RMSNorm(torch.autograd.Function):
    """Returns (y, h), where h is x + residual, or None without one. Saves h (or x), the weight, and rstd [..., 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        offset: float,
        cast_first: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        added = residual is not None
        if residual is not None and residual.dtype != x.dtype:
            x, residual = x + residual, None
        forward, _ = _forms(x, weight, compiled)
        y, h, rstd = forward(x, residual, weight, eps, offset, cast_first)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset, ctx.cast_first, ctx.compiled = offset, cast_first, compiled
        ctx.set_materialize_grads(False)
        return y, h if added else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dh = grads
        h, weight, rstd = ctx.saved_tensors
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        dweight = None
        if dy is not None:
            _, backward = _forms(h, weight, ctx.compiled)
            dh, dweight = backward(dy, dh, h, weight, rstd, ctx.offset, ctx.cast_first, need_weight)
        dx = dh.to(ctx.dtypes[0]) if need_x and dh is not None else None
        dresidual = dh.to(ctx.dtypes[1]) if need_residual and dh is not None else None
        return dx, dresidual, dweight, None, None, None, None


def _forms(x: Tensor, weight: Tensor, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward for x's device and dtype."""
    if runs_triton(x):
        from tunery.kernels import triton_rms_norm

        return triton_rms_norm.forward, triton_rms_norm.backward
    if compiled and runs_compiled(x, weight):
        from tunery.kernels import compiled as kernels

        return kernels.rms_forward, kernels.rms_backward
    return _forward, _backward


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or x itself, rstd [..., 1]) in torch operations: as few passes over memory as they allow."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(h.dtype, torch.float32)
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide)
    rstd = rstd.square_().div_(h.shape[-1]).add_(eps).rsqrt_()
    y = h * rstd  # promoted to `wide`
    if not cast_first:
        return y.mul_(weight.to(wide).add(offset)).to(h.dtype), h, rstd
    y, scale = y.to(h.dtype), weight + offset if offset else weight
    in_place = torch.promote_types(y.dtype, scale.dtype) == y.dtype
    return (y.mul_(scale) if in_place else y * scale), h, rstd


def _backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    cast_first: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d h with `dh`, what comes to h from elsewhere, added; d loss / d weight or None)."""
    dweight = _weight_gradient(dy, h, weight, rstd, cast_first) if need_weight else None
    return _input_gradient(dy, dh, h, weight, rstd, offset), dweight


def _input_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    wide = rstd.dtype
    scale = weight.to(wide).add(offset) if offset else weight
    g = dy.to(wide, copy=True).mul_(scale) if dy.dtype != wide else dy * scale
    h = h.to(wide)
    slope = (g * h).sum(-1, keepdim=True).mul_(rstd**3).div_(-h.shape[-1])
    g.mul_(rstd).addcmul_(h, slope)
    return g if dh is None else g.add_(dh)


def _weight_gradient(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, cast_first: bool) -> Tensor:
    normed = h * rstd
    if cast_first:
        normed = normed.to(h.dtype)
    return (normed.to(rstd.dtype) * dy).flatten(0, -2).sum(0).to(weight.dtype)
