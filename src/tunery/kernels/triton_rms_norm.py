"""RMSNorm in Triton: one pass over the rows forward, one backward. The formulas are in rms_norm.py.

A program holds whole rows, several of them when they are short. In the backward a fixed number of programs share the
rows and each adds up its own part of the weight's gradient in registers; the parts are added afterwards, so the sum's
order, and with it every bit, is the same from run to run."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (a kernel is called with a grid and options, and with plain values for its constants)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunery.kernels.backends import as_rows, device_of, power_of_two, warps

# Elements of a tile, and programs in the backward: a few for each multiprocessor of a large GPU.
TILE = 4096
PROGRAMS = 512


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or x itself, rstd [..., 1] float32)."""
    rows = as_rows(x)
    n, width = rows.shape
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = power_of_two(width)
    tile_rows = max(1, TILE // block)
    if n:
        other = rows if residual is None else as_rows(residual)
        with device_of(x):
            _forward_kernel[(triton.cdiv(n, tile_rows),)](
                rows,
                other,
                h,
                weight.contiguous(),
                y,
                rstd,
                n,
                width,
                rows.stride(0),
                other.stride(0),
                eps,
                offset,
                CAST_FIRST=cast_first,
                ADD=residual is not None,
                ROWS=tile_rows,
                BLOCK=block,
                num_warps=warps(tile_rows * block),
            )
    return y, h, rstd


def backward(
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
    rows, dy = as_rows(h), as_rows(dy)
    n, width = rows.shape
    block = power_of_two(width)
    tile_rows = max(1, TILE // block)
    programs = min(PROGRAMS, triton.cdiv(n, tile_rows))
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    parts = torch.empty((programs, width), dtype=torch.float32, device=h.device) if need_weight else None
    if n:
        more = dy if dh is None else as_rows(dh)
        with device_of(h):
            _backward_kernel[(programs,)](
                dy,
                more,
                rows,
                weight.contiguous(),
                rstd,
                dx,
                dx if parts is None else parts,
                n,
                width,
                dy.stride(0),
                more.stride(0),
                rows.stride(0),
                offset,
                CAST_FIRST=cast_first,
                ADD=dh is not None,
                WEIGHT=need_weight,
                ROWS=tile_rows,
                BLOCK=block,
                num_warps=warps(tile_rows * block),
            )
    return dx, None if parts is None else parts.sum(0).to(weight.dtype)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    h_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    n,
    width,
    x_stride,
    residual_stride,
    eps,
    offset,
    CAST_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        tl.store(h_ptr + row[:, None] * width + column[None, :], x, mask=inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < n)
    scale = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    normed = wide * rstd[:, None]
    if CAST_FIRST:
        normed = normed.to(x.dtype).to(tl.float32)
    y = (normed * scale[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * width + column[None, :], y, mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    parts_ptr,
    n,
    width,
    dy_stride,
    dh_stride,
    h_stride,
    offset,
    CAST_FIRST: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    scale = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS), tl.num_programs(0)):
        row = tl.full((), tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < n)[:, None] & (column < width)[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row[:, None] * h_stride + column[None, :], mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < n, other=0.0)
        normed = h.to(tl.float32) * rstd[:, None]
        g = dy * scale[None, :]
        mean = tl.sum(g * normed, axis=1) / width
        dx = (g - normed * mean[:, None]) * rstd[:, None]
        if ADD:
            dx += tl.load(dh_ptr + row[:, None] * dh_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT:
            if CAST_FIRST:
                normed = normed.to(h.dtype).to(tl.float32)
            part += tl.sum(dy * normed, axis=0)
    if WEIGHT:
        tl.store(parts_ptr + tl.program_id(0) * width + column, part, mask=column < width)
