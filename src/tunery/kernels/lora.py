"""Linear layers with low-rank updates that read the same input, as one autograd function.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T           (Hu et al., arXiv:2106.09685, eq. 3)

The frozen W_i get no gradient, and nothing of their size is ever made for the updates: the backward goes through the
rank first, dA_i = s_i (dy_i B_i)^T x, dB_i = s_i dy_i^T (x A_i^T), and the gradients of x are summed in one buffer.
Kept for the backward are x, once for the whole group, and x A^T; PEFT's own forward keeps x for each projection, in
float32 as well, and makes two tensors of the output's size on the way. An x that is a gated activation is not kept: the
backward of the activation, which has its two factors in hand, makes it again on its way over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels import swiglu


@dataclass(frozen=True, slots=True)
class Projection:
    """One of the group. weight [out, in] and bias [out] frozen, A [r, in], B [out, r], scale s."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def lora_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Every projection of x [..., in], each [..., out_i]. Under autocast everything is cast to its dtype, as the linear
    layers would be; the gradients of A and B come in their own dtype. Raises ValueError where a frozen weight or bias
    requires a gradient: it would get none."""
    _check_frozen(projections)
    adapters = [t for p in projections for t in (p.A, p.B)]
    layers = [(p.weight, p.bias, p.scale) for p in projections]
    outputs = _LoraLinear.apply(x.to(_dtype(x)).flatten(0, -2), layers, *adapters)
    return tuple(y.unflatten(0, x.shape[:-1]) for y in outputs)


def gated_lora_linear(gate: Tensor, up: Tensor, p: Projection, activation: str, compiled: bool = False) -> Tensor:
    """lora_linear of activation(gate) * up, both [..., in], of which gate and up are kept and the product is not.
    `activation` and `compiled` as of swiglu.py. Raises ValueError as lora_linear and swiglu do."""
    _check_frozen([p])
    swiglu.check(gate, up)
    rows = (x.to(_dtype(x)).flatten(0, -2) for x in (gate, up))
    y = _GatedLoraLinear.apply(*rows, (p.weight, p.bias, p.scale), activation, compiled, p.A, p.B)
    return y.unflatten(0, gate.shape[:-1])


def _check_frozen(projections: Sequence[Projection]) -> None:
    frozen = [t for p in projections for t in (p.weight, p.bias) if t is not None]
    if any(t.requires_grad for t in frozen):
        raise ValueError("lora_linear: the weights beneath the updates must be frozen")


def _dtype(x: Tensor) -> torch.dtype:
    """What the linear layers would compute in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def reference(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The same by autograd, one projection after the other."""
    return tuple(
        F.linear(x, p.weight.to(x.dtype), p.bias if p.bias is None else p.bias.to(x.dtype))
        + p.scale * F.linear(F.linear(x, p.A.to(x.dtype)), p.B.to(x.dtype))
        for p in projections
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: list[tuple[Tensor, Tensor | None, float]], *adapters: Tensor) -> Any:
        As, Bs = adapters[0::2], adapters[1::2]
        ranks = [A.shape[0] for A in As]
        with torch.autocast(x.device.type, enabled=False):
            A_cat = _stacked(As, x.dtype)
            xA = x @ A_cat.T
            outputs = []
            for (weight, bias, scale), B, xA_i in zip(layers, Bs, xA.split(ranks, dim=1), strict=True):
                y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
                outputs.append(y.addmm_(xA_i, B.to(x.dtype).T, alpha=scale))
        ctx.save_for_backward(x, xA, *(weight for weight, _, _ in layers), *adapters)
        ctx.scales, ctx.ranks = [scale for _, _, scale in layers], ranks
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = len(ctx.ranks)
        x, xA, *rest = ctx.saved_tensors
        weights, As, Bs = rest[:count], rest[count::2], rest[count + 1 :: 2]
        grads_A: list[Tensor | None] = [None] * count
        grads_B: list[Tensor | None] = [None] * count
        dx = None
        with torch.autocast(x.device.type, enabled=False):
            by_rank = []  # s_i dy_i B_i, [T, r_i]
            for i, (dy, B, xA_i) in enumerate(zip(grads, Bs, xA.split(ctx.ranks, dim=1), strict=True)):
                by_rank.append((dy @ B.to(x.dtype)).mul_(ctx.scales[i]))
                grads_B[i] = (dy.T @ xA_i).to(B.dtype).mul_(ctx.scales[i])
            dxA = torch.cat(by_rank, dim=1) if count > 1 else by_rank[0]
            for i, dA in enumerate((dxA.T @ x).split(ctx.ranks)):
                grads_A[i] = dA.to(As[i].dtype)
            if ctx.needs_input_grad[0]:
                dx = grads[0] @ weights[0].to(x.dtype)
                for dy, weight in zip(grads[1:], weights[1:], strict=True):
                    dx.addmm_(dy, weight.to(x.dtype))
                dx.addmm_(dxA, _stacked(As, x.dtype))
        return dx, None, *(g for pair in zip(grads_A, grads_B, strict=True) for g in pair)


class _GatedLoraLinear(torch.autograd.Function):
    """Of one projection. `x` is activation(gate) * up."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        layer: tuple[Tensor, Tensor | None, float],
        activation: str,
        compiled: bool,
        A: Tensor,
        B: Tensor,
    ) -> Tensor:
        weight, bias, ctx.scale = layer
        with torch.autocast(gate.device.type, enabled=False):
            x = swiglu.forms(gate, compiled)[0](gate, up, activation)
            xA = x @ A.to(x.dtype).T
            y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            y.addmm_(xA, B.to(x.dtype).T, alpha=ctx.scale)
        ctx.save_for_backward(gate, up, xA, weight, A, B)
        ctx.activation, ctx.compiled = activation, compiled
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, xA, weight, A, B = ctx.saved_tensors
        (dy,) = grads
        with torch.autocast(gate.device.type, enabled=False):
            dxA = (dy @ B.to(gate.dtype)).mul_(ctx.scale)
            grad_B = (dy.T @ xA).to(B.dtype).mul_(ctx.scale)
            x = (dy @ weight.to(gate.dtype)).addmm_(dxA, A.to(gate.dtype))  # its gradient, then x itself
            dgate, dup = swiglu.forms(gate, ctx.compiled)[1](x, gate, up, ctx.activation, again=True)
            grad_A = (dxA.T @ x).to(A.dtype)
        return dgate, dup, None, None, None, grad_A, grad_B


def _stacked(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[sum of the ranks, in]"""
    return As[0].to(dtype) if len(As) == 1 else torch.cat([A.to(dtype) for A in As])
