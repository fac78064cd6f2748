"""Which form of a kernel runs, and what the forms share. Each has the plain torch form, which runs anywhere; Triton's
on CUDA; and one compiled for a CPU, for those who ask. Triton comes with torch's CUDA builds, and importing this file
needs neither it nor a compiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether x belongs to a Triton kernel: on a CUDA device, and not in float64, whose arithmetic they do not do."""
    return x.is_cuda and x.dtype != torch.float64 and triton_installed()


def has_numbers(x: Tensor) -> bool:
    """False for torch's meta and fake tensors, which are shapes alone: a plan runs the model on those."""
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def runs_compiled(*tensors: Tensor) -> bool:
    """Whether these belong to the kernels of compiled.py: on a CPU, in bfloat16 or float32."""
    low = (torch.bfloat16, torch.float32)
    return all(t.device.type == "cpu" and t.dtype in low and has_numbers(t) for t in tensors)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's. (Its interpreter has x on a CPU.)"""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """x [..., H] as [N, H] with adjacent columns; a view where x's strides allow it, so a slice of a wider matrix
    (one half of a fused projection) is not copied."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: what the side of a Triton block must be."""
    return 1 << max(0, n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a Triton block: about 16 elements a thread, between 4 and 16 warps."""
    return min(16, max(4, power_of_two(elements // 512)))
