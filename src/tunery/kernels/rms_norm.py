"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), optionally with the residual addition before it.

    y = x * rstd * (weight + offset),     rstd = 1 / sqrt(mean(x^2) + eps)

with the statistics in float32 or wider. Autograd through the library's form keeps three or four matrices alive, two of
them in float32; here only x, the weight and one number a row are kept. With g = dy * (weight + offset) and
x' = x * rstd:

    dx = rstd * (g - x' * mean(g * x')),     dweight = sum over rows of dy * x'
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.triton_support import runs_triton


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """x normalised over its last dimension, which may follow any others ([..., H], or [..., heads, D] for the norms of
    Qwen 3's queries and keys).

    `cast_first` is the library's Llama norm: x * rstd is rounded to x's dtype, then multiplied by the weight, so the
    result has the dtype that x's and the weight's promote to. Otherwise it is Gemma's (with `offset` 1): everything in
    float32, rounded once, to x's dtype. Differentiable once."""
    return _RMSNorm.apply(x_TH, None, weight_H, eps, offset, cast_first)[0]


def add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual). The sum is rounded to its dtype before it is normalised, as it is when
    the two are written apart."""
    return _RMSNorm.apply(x_TH, residual_TH, weight_H, eps, offset, cast_first)


def reference(x_TH: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """The same the obvious way, gradients by autograd."""
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    x = x_TH.to(wide)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight_H + offset) * normed.to(x_TH.dtype)
    return (normed * (weight_H.to(wide) + offset)).to(x_TH.dtype)


class _RMSNorm(torch.autograd.Function):
    """Returns (y, h), where h is x + residual, or None without one. Saves h (or x), the weight, and rstd [..., 1]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
    ) -> tuple[Tensor, Tensor | None]:
        h = x if residual is None else x + residual
        if runs_triton(h):
            from tunery.kernels import triton_rms_norm

            y, rstd = triton_rms_norm.forward(h, weight, eps, offset, cast_first)
        else:
            y, rstd = _forward(h, weight, eps, offset, cast_first)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset, ctx.cast_first = offset, cast_first
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        return y, None if residual is None else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dh = grads
        h, weight, rstd = ctx.saved_tensors
        need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
        dweight = None
        if dy is not None:
            if runs_triton(h):
                from tunery.kernels import triton_rms_norm

                dh, dweight = triton_rms_norm.backward(dy, dh, h, weight, rstd, ctx.offset, ctx.cast_first, need_weight)
            else:
                if need_weight:
                    dweight = _weight_gradient(dy, h, weight, rstd, ctx.cast_first)
                dh = _input_gradient(dy, dh, h, weight, rstd, ctx.offset)
        dx = dh.to(ctx.dtypes[0]) if need_x and dh is not None else None
        dresidual = dh.to(ctx.dtypes[1]) if need_residual and dh is not None else None
        return dx, dresidual, dweight, None, None, None


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """(y, rstd [..., 1]) in torch operations: as few passes over memory as they allow."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = x * rstd  # promoted to `wide`
    if not cast_first:
        return y.mul_(weight.to(wide).add(offset)).to(x.dtype), rstd
    y, scale = y.to(x.dtype), weight + offset if offset else weight
    return (y.mul_(scale) if torch.promote_types(y.dtype, scale.dtype) == y.dtype else y * scale), rstd


def _input_gradient(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """d loss / d h: through the norm, plus what comes to h itself."""
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
