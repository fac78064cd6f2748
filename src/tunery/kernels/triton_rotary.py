"""Rotary embedding in Triton: one pass, cos and sin of a token read once for many heads. The formula: rotary.py."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (a kernel is called with a grid and options, and with plain values for its constants)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunery.kernels.backends import device_of, power_of_two, warps

TILE = 8192  # elements of one half of the heads that a program turns


def turn(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, back: bool) -> Tensor:
    """x [B, heads, T, D], of any strides, turned by the angles, or by the transposed rotation (`back`)."""
    batch, heads, tokens, depth = x.shape
    width = cos_BTR.shape[-1]
    cos, sin = cos_BTR.contiguous(), sin_BTR.contiguous()
    y = torch.empty_like(x)
    block = power_of_two(width // 2)
    tile_heads = min(power_of_two(heads), max(1, TILE // block))
    if x.numel():
        with device_of(x):
            _turn_kernel[(batch * tokens, triton.cdiv(heads, tile_heads))](
                x,
                cos,
                sin,
                y,
                *x.stride(),
                *y.stride(),
                cos.stride(0) if cos.shape[0] > 1 else 0,
                heads,
                tokens,
                width // 2,
                depth - width,
                BACK=back,
                HEADS=tile_heads,
                BLOCK=block,
                REST=power_of_two(depth - width) if depth > width else 0,
                num_warps=warps(tile_heads * block),
            )
    return y


@triton.jit
def _turn_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    x_batch,
    x_head,
    x_token,
    x_depth,
    y_batch,
    y_head,
    y_token,
    y_depth,
    cos_batch,
    heads,
    tokens,
    half,
    rest,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)
    angle = batch * cos_batch + token * 2 * half + i
    cos_a = tl.load(cos_ptr + angle, mask=i < half, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + angle + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + angle, mask=i < half, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + angle + half, mask=i < half, other=0.0).to(tl.float32)[None, :]
    x = x_ptr + batch * x_batch + token * x_token + head * x_head
    y = y_ptr + batch * y_batch + token * y_token + head * y_head
    inside = (head < heads) & (i < half)[None, :]
    a = tl.load(x + i[None, :] * x_depth, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + (i[None, :] + half) * x_depth, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        a_turned = a * cos_a + b * sin_b
        b_turned = b * cos_b - a * sin_a
    else:
        a_turned = a * cos_a - b * sin_a
        b_turned = b * cos_b + a * sin_b
    tl.store(y + i[None, :] * y_depth, a_turned.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y + (i[None, :] + half) * y_depth, b_turned.to(y_ptr.dtype.element_ty), mask=inside)
    if REST > 0:
        j = tl.arange(0, REST)
        inside = (head < heads) & (j < rest)[None, :]
        kept = tl.load(x + (j[None, :] + 2 * half) * x_depth, mask=inside, other=0.0)
        tl.store(y + (j[None, :] + 2 * half) * y_depth, kept, mask=inside)
