"""Packed attention as a plan sees it: what it keeps and what it does, without doing it.

The real back ends (models/attention.py) cut a stream into sequences and blocks, run on their own device only, and keep
tables for later calls; none of that belongs into a run on shapes. What they keep is simple: the blocked one on a CPU
its inputs, the fused ones (CUDA's, and the compiled one on a CPU) the output and a number a row besides."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunery.kernels import compiled, segment_attention
from tunery.models import attention

NAME = "tunery_plan"


@contextmanager
def standing_in(model: Any, fused: bool, note_work: Callable[..., None] = lambda *_: None) -> Iterator[None]:
    """Let `model`, where it takes our hook, attend with nothing computed. `fused`: as the CUDA back ends do;
    `note_work` is told what Ledger.note_work is."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    if before not in attention.HOOKS:
        yield
        return
    real = attention.HOOKS[before]

    def hook(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
        segment_lengths: list[int] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        lengths = segment_lengths or [query.shape[2]]
        if before != attention.NAME or softcap is not None or s_aux is not None or dropout > 0.0:
            return real(
                module, query, key, value, attention_mask, dropout=dropout, sliding_window=sliding_window,
                softcap=softcap, s_aux=s_aux, segment_lengths=lengths, **kwargs,
            )  # fmt: skip
        device = query.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        if fused:
            size = Size(sum(_pairs(length, sliding_window) for length in lengths), fused=True)
        else:
            size = _on_a_cpu(query, key, value, lengths, sliding_window)
        return _Attention.apply(query, key, value, size, note_work), None

    attention.HOOKS[NAME] = hook
    AttentionInterface.register(NAME, hook)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del attention.HOOKS[NAME]


@dataclass(frozen=True)
class Size:
    """Of one call: (query, key) pairs whose scores are made; whether it is `fused`, one operation that keeps its
    output; else its blocks, and their different shapes (queries, keys)."""

    pairs: int
    fused: bool
    blocks: int = 1
    shapes: frozenset[tuple[int, int]] = frozenset()


# Operations of a block in segment_attention.py's forward and backward, and the products among them.
OPERATIONS, PRODUCTS = (8, 20), (2, 4)


def _on_a_cpu(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Size:
    pairs = segment_attention.pairs(lengths, query.dtype, window)
    known = query.dtype in (torch.bfloat16, torch.float32)
    if known and compiled.ready() and compiled.takes_attention(query[0], key[0], value[0]):
        return Size(pairs, fused=True)
    blocks = segment_attention.blocks(lengths, query.dtype, window)
    return Size(pairs, False, len(blocks), frozenset((end - first, end - seen) for seen, first, end, _ in blocks))


def _pairs(length: int, window: int | None) -> int:
    """(query, key) pairs that causal attention over a sequence looks at."""
    inside = length if window is None else min(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * inside


class _Attention(torch.autograd.Function):
    """[1, heads, T, D] and twice [1, kv_heads, T, D] to [1, T, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, size: Size, note_work: Callable[..., None]
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        # Torch's own operation, by which recomputing in part (models/recompute.py) knows what is worth keeping.
        like_out = query.new_empty(1, tokens, heads, value.shape[-1]).transpose(1, 2)
        out, row_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(like_out, key, value, 0.0, True)
        out = out.transpose(1, 2)
        if size.fused:
            ctx.save_for_backward(query, key, value, out, row_sums)
        else:
            ctx.save_for_backward(query, key, value)
        dims = query.shape[-1] + value.shape[-1]
        flops = 2 * size.pairs * heads * dims
        moved = sum(x.numel() * x.element_size() for x in (query, key, value, out))
        ctx.size, ctx.work, ctx.note_work = size, (query.element_size() == 2, flops, moved), note_work
        _note(ctx, 0, flops, moved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        _, flops, moved = ctx.work
        _note(ctx, 1, 5 * flops // 2, 2 * moved)  # five products, the scores' made again
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def _note(ctx: Any, backward: int, flops: int, moved: int) -> None:
    size: Size = ctx.size
    shapes: list[Hashable] = [(NAME, backward, n, s) for n in range(PRODUCTS[backward]) for s in size.shapes]
    operations = 1 if size.fused else size.blocks * OPERATIONS[backward]
    ctx.note_work(ctx.work[0], flops, moved, operations, shapes)
