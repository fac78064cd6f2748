"""Gated activations in Triton: one pass forward, one backward. Both activations are x * sigmoid(z(x)): silu with z = x,
and GELU's tanh approximation with z = sqrt(8 / pi) * (x + 0.044715 x^3), because (1 + tanh(u)) / 2 = sigmoid(2 u)."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (a kernel is called with a grid and options, and with plain values for its constants)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunery.kernels.backends import as_rows, device_of

BLOCK = 1024


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate_rows, up_rows = as_rows(gate), as_rows(up)
    n, width = gate_rows.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        with device_of(gate):
            _forward_kernel[(n, triton.cdiv(width, BLOCK))](
                gate_rows,
                up_rows,
                y,
                width,
                gate_rows.stride(0),
                up_rows.stride(0),
                SILU=activation == "silu",
                BLOCK=BLOCK,
            )
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> tuple[Tensor, Tensor]:
    """(d loss / d gate, d loss / d up). Where `again`, dy, which must have adjacent columns, becomes activation(gate) *
    up."""
    dy_rows, gate_rows, up_rows = as_rows(dy), as_rows(gate), as_rows(up)
    n, width = gate_rows.shape
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dgate.numel():
        with device_of(gate):
            _backward_kernel[(n, triton.cdiv(width, BLOCK))](
                dy_rows,
                gate_rows,
                up_rows,
                dgate,
                dup,
                width,
                dy_rows.stride(0),
                gate_rows.stride(0),
                up_rows.stride(0),
                SILU=activation == "silu",
                AGAIN=again,
                BLOCK=BLOCK,
            )
    return dgate, dup


@triton.jit
def _sigmoid(x, SILU: tl.constexpr):
    """(s = sigmoid(z(x)), (1 - s) z'(x)), neither by a difference, which would cancel, nor by an exponential that
    overflows."""
    if SILU:
        z = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    else:
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    e = tl.exp(-tl.abs(z))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small) * slope


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, y_ptr, width, gate_stride, up_stride, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid(x, SILU)
    tl.store(y_ptr + row * width + column, (x * sigmoid * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    dy_stride,
    gate_stride,
    up_stride,
    SILU: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, rest = _sigmoid(x, SILU)
    dgate = dy * up * sigmoid * (1.0 + x * rest)
    tl.store(dgate_ptr + row * width + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * width + column, (dy * x * sigmoid).to(dup_ptr.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(dy_ptr + row * dy_stride + column, (x * sigmoid * up).to(dy_ptr.dtype.element_ty), mask=inside)
