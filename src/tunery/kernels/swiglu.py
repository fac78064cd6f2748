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


def swiglu(gate: Tensor, up: Tensor, compiled: bool = False) -> Tensor:
    """silu(gate) * up, of one shape and dtype. `compiled` asks for compiled.py's form on a CPU (in bfloat16 and
    float32). Differentiable once. Raises ValueError where shapes or dtypes differ."""
    _check(gate, up)
    return _Gated.apply(gate, up, "silu", compiled)


def geglu_tanh(gate: Tensor, up: Tensor, compiled: bool = False) -> Tensor:
    """gelu(gate) * up with gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))); otherwise as swiglu."""
    _check(gate, up)
    return _Gated.apply(gate, up, "gelu_tanh", compiled)


def reference(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The same the obvious way, gradients by autograd."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate / 2 * (1 + torch.tanh(inner)) * up


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        both = " and ".join(f"{t.dtype} {tuple(t.shape)}" for t in (gate, up))
        raise ValueError(f"gate and up must have one shape and dtype, not {both}")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, compiled: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.compiled = activation, compiled
        forward, _ = _forms(gate, compiled)
        return forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        _, backward = _forms(gate, ctx.compiled)
        return (*backward(grads[0], gate, up, ctx.activation), None, None)


def _forms(gate: Tensor, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward for the tensors' device and dtype."""
    if runs_triton(gate):
        from tunery.kernels import triton_swiglu

        return triton_swiglu.forward, triton_swiglu.backward
    if compiled and runs_compiled(gate):
        from tunery.kernels import compiled as kernels

        return kernels.gated_forward, kernels.gated_backward
    return _forward, _backward


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activate(gate, activation).mul_(up)


def _backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(d loss / d gate, d loss / d up)."""
    dup = _activate(gate, activation).mul_(dy)
    da = dy * up
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=da), dup
    return torch.ops.aten.gelu_backward.grad_input(da, gate, approximate="tanh", grad_input=da), dup


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")
