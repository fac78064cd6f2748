"""Gated activations: silu(gate) * up (SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6, without the matrices) and Gemma's
gelu(gate) * up with the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

Autograd keeps gate, up and the activation of the gate; here the backward makes that one again, so two matrices are kept
and not three. With a = activation(gate):

    dup = dy * a,     dgate = dy * up * activation'(gate)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.triton_support import runs_triton


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype. Differentiable once."""
    return _Gated.apply(gate, up, "silu")


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), of one shape and dtype.
    Differentiable once."""
    return _Gated.apply(gate, up, "gelu_tanh")


def reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The same the obvious way, gradients by autograd."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(inner)) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        if runs_triton(gate):
            from tunery.kernels import triton_swiglu

            return triton_swiglu.forward(gate, up, activation)
        return _activate(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        gate, up = ctx.saved_tensors
        if runs_triton(gate):
            from tunery.kernels import triton_swiglu

            return (*triton_swiglu.backward(dy, gate, up, ctx.activation), None)
        need_gate, need_up = ctx.needs_input_grad[:2]
        dup = _activate(gate, ctx.activation).mul_(dy) if need_up else None
        dgate = _slope_(dy * up, gate, ctx.activation) if need_gate else None
        return dgate, dup, None


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def _slope_(da: Tensor, gate: Tensor, activation: str) -> Tensor:
    """d loss / d gate, written over da = d loss / d activation(gate)."""
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=da)
    return torch.ops.aten.gelu_backward.grad_input(da, gate, approximate="tanh", grad_input=da)
