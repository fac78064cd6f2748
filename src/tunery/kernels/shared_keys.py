"""Streams in which pieces continue others (data/collate.py): the keys that each piece sees, side by side.

A piece that stands right behind the one it continues is one run of tokens with it. For every other one the keys of what
it continues are copied before its own, so that each run of queries sees one run of keys and stands at the end of it:
causal attention with the last query on the last key, which is what every back end computes once it is told two lengths
instead of one. Keys and values alone are copied; whatever costs much happens once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class SharedKeys:
    """How the keys of a stream of T tokens are laid out for its runs.

    `queries`, `keys`: of each run, how many of both it has. `places` int64 [K], which token of the stream stands at
    each place of the layout; `own` int64 [T], where each token stands among the keys of its own run; `copies`, of the
    first, second, ... copies of tokens: (places in the layout, tokens), int64, no token twice. `cu_queries`, `cu_keys`
    int32, cumulative. Tensors are on the stream's device."""

    queries: list[int]
    keys: list[int]
    places: Tensor
    own: Tensor
    copies: list[tuple[Tensor, Tensor]]
    cu_queries: Tensor
    cu_keys: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Keys or values [heads, T, D] as laid out, [heads, K, D]. Differentiable once."""
        return _Gather.apply(x, self)


def shared_keys(lengths: Sequence[int], continues: Sequence[int], device: torch.device) -> SharedKeys:
    """The layout of a stream of pieces: Batch.lengths and Batch.continues."""
    return _layout(tuple(lengths), tuple(continues), device)


@lru_cache(maxsize=4)  # asked for by every layer
def _layout(lengths: tuple[int, ...], continues: tuple[int, ...], device: torch.device) -> SharedKeys:
    ends = np.cumsum(lengths)
    seen: list[np.ndarray] = []  # by each piece
    runs: list[np.ndarray] = []  # the same of each run
    queries: list[int] = []
    for number, (length, before) in enumerate(zip(lengths, continues, strict=True)):
        mine = np.arange(ends[number] - length, ends[number])
        seen.append(mine if before < 0 else np.concatenate([seen[before], mine]))
        if 0 <= before == number - 1:  # the run goes on
            runs[-1] = seen[number]
            queries[-1] += length
        else:
            runs.append(seen[number])
            queries.append(length)
    keys = [len(run) for run in runs]
    places, starts = np.concatenate(runs), np.cumsum(keys) - keys
    first_own = np.repeat(starts + keys - queries, keys)
    is_own = np.arange(len(places)) >= first_own

    def there(numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        tensor = torch.from_numpy(np.asarray(numbers)).to(dtype)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    copied = np.flatnonzero(~is_own)
    which = _occurrence(places[copied])
    copies = [copied[which == number] for number in range(int(which.max(initial=-1)) + 1)]
    return SharedKeys(
        queries, keys, there(places), there(np.flatnonzero(is_own)), [(there(at), there(places[at])) for at in copies],
        there(np.cumsum([0, *queries]), torch.int32), there(np.cumsum([0, *keys]), torch.int32),
    )  # fmt: skip


def _occurrence(values: np.ndarray) -> np.ndarray:
    """How often each value has been there before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(np.append(begins, len(values)))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - np.repeat(begins, counts)
    return result


class _Gather(torch.autograd.Function):
    """index_select, whose own backward adds up in no fixed order on CUDA, and in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SharedKeys) -> Tensor:
        ctx.layout = layout
        return x.index_select(1, layout.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, layout = grad_outputs[0], ctx.layout
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.index_select(1, layout.own).to(wide)
        for at, tokens in layout.copies:
            total.index_add_(1, tokens, grad.index_select(1, at).to(wide))
        return total.to(grad.dtype), None
