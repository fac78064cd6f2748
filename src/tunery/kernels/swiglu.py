"""Gated activations: silu(gate) * up (SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6, without the matrices) and Gemma's
gelu(gate) * up with the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2).

Autograd keeps gate, up and the activation of the gate; here the backward makes that one again, so two matrices are kept
and not three. With a = activation(gate):

    dup = dy * a,     dgate = dy * up * activation'(gate)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.backends import runs_compiled, runs_triton


def gated(gate: Tensor, up: Tensor, activation: str = "silu", compiled: bool = False) -> Tensor:
    """activation(gate) * up, of one shape and dtype; `activation` is silu or gelu_tanh, gelu_tanh(x) = x / 2 * (1 +
    tanh(sqrt(2 / pi) * (x + 0.044715 x^3))). `compiled` asks for compiled.py's form on a CPU (in bfloat16 and float32).
    Differentiable once. Raises ValueError where shapes or dtypes differ."""
    check(gate, up)
    return _Gated.apply(gate, up, activation, compiled)


def reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The same the obvious way, gradients by autograd."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(inner)) * up


def check(gate: Tensor, up: Tensor) -> None:
    """Raises ValueError where shapes or dtypes differ."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        both = " and ".join(f"{t.dtype} {tuple(t.shape)}" for t in (gate, up))
        raise ValueError(f"gate and up must have one shape and dtype, not {both}")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, compiled: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.compiled = activation, compiled
        forward, _ = forms(gate, compiled)
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        _, backward = forms(gate, ctx.compiled)
        return (*backward(grads[0], gate, up, ctx.activation, again=False), None, None)


def forms(gate: Tensor, compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """forward(gate, up, activation) and backward(dy, gate, up, activation, again) for the tensors' device and dtype.
    Where `again`, the backward leaves in dy, which is contiguous then, what the forward gave."""
    if runs_triton(gate):
        from tunery.kernels import triton_swiglu

        return triton_swiglu.forward, triton_swiglu.backward
    if compiled and runs_compiled(gate):
        from tunery.kernels import compiled as kernels

        return kernels.gated_forward, kernels.gated_backward
    return _forward, _backward


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activate(gate, activation).mul_(up)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> tuple[Tensor, Tensor]:
    """(d loss / d gate, d loss / d up)."""
    da, a = dy * up, _activate(gate, activation)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=da)
    else:
        torch.ops.aten.gelu_backward.grad_input(da, gate, approximate="tanh", grad_input=da)
    if not again:
        return da, a.mul_(dy)
    dup = a * dy
    torch.mul(a, up, out=dy)
    return da, dup


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")
