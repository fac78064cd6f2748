"""What the Triton kernels share. Triton comes with torch's CUDA builds; importing this file does not need it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether x belongs to a Triton kernel: on a CUDA device, and not in float64, whose arithmetic they do not do."""
    return x.is_cuda and x.dtype != torch.float64 and installed()


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be x's. (Triton's interpreter has x on a CPU.)"""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """x [..., H] as [N, H] with adjacent columns; a view where x's strides allow it, so a slice of a wider matrix
    (one half of a fused projection) is not copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: what a block's side must be."""
    return 1 << max(0, n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile: about 16 elements a thread, between 4 and 16 warps."""
    return min(16, max(4, power_of_two(elements // 512)))
