"""Causal attention within each sequence of a packed stream, for CPUs.

Queries are taken a block at a time against the keys before the block's end, so half of the score matrix is never made;
every product is one batched matmul over the key-value heads, with the queries that share a head stacked beneath one
another. The backward makes the probabilities again, so nothing but the inputs is kept: memory is that of the inputs,
whatever the length (FlashAttention's bargain, arXiv:2205.14135, section 3.1). In 16 bits the scores are rounded to 16
bits, as in the eager attention of transformers; the softmax and its sums are in float32.

The compiled form (attention.cpp) has FlashAttention's tiling as well, keeps scores in float32, and keeps its output and
the logarithms of the softmax's sums for the backward; the output is kept in any case, as the next projection's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunery.kernels.backends import runs_compiled

# Queries in a block: larger products in bfloat16, where they are fast, less wasted above the diagonal in float32.
BLOCK = {torch.bfloat16: 128, torch.float32: 64}


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    compiled: bool = False,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over positions j <= i of the same sequence (and i - j < `window`, where given).

    query [heads, T, D]; key [kv_heads, T, D]; value [kv_heads, T, Dv]; heads a multiple of kv_heads; `lengths` of the
    sequences, summing to T. `key_lengths`: where keys and values are of longer sequences, of which the queries are the
    last (shared_keys.py). `compiled` asks for compiled.py's form (in bfloat16 where the processor multiplies that,
    and float32; D and Dv multiples of 16). Returns [T, heads, Dv], contiguous. Differentiable once.
    Raises ValueError for lengths that do not add up to the tokens there are."""
    if (sum(lengths), sum(key_lengths or lengths)) != (query.shape[1], key.shape[1]):
        given = f"{sum(lengths)} queries and {sum(key_lengths or lengths)} keys"
        raise ValueError(f"sequences of {given} in all, where there are {query.shape[1]} and {key.shape[1]}")
    if compiled and runs_compiled(query, key, value):
        from tunery.kernels import compiled as kernels

        if kernels.takes_attention(query, key, value):
            bounds = torch.tensor([0, *accumulate(lengths)])
            key_bounds = bounds if key_lengths is None else torch.tensor([0, *accumulate(key_lengths)])
            return _Tiled.apply(query, key, value, bounds, key_bounds, scale, window)
    blocks = _blocks(lengths, BLOCK.get(query.dtype, 64), window, key_lengths)
    return _SegmentAttention.apply(query, key, value, blocks, scale, window)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """The same by torch's scaled_dot_product_attention, one sequence after the other."""
    groups = query.shape[0] // key.shape[0]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    pieces = []
    # split, not slices: the backward of R slices would fill and add R gradients of the whole stream
    queries, keys = query.split(list(lengths), dim=1), list(key_lengths or lengths)
    for q, k, v in zip(queries, key.split(keys, dim=1), value.split(keys, dim=1), strict=True):
        length, before = k.shape[1], k.shape[1] - q.shape[1]
        if before == 0 and (window is None or window >= length):
            pieces.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0])
            continue
        seen = torch.ones(q.shape[1], length, dtype=torch.bool, device=q.device).tril(before)
        if window is not None:
            seen = seen.triu(before + 1 - window)
        pieces.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0])
    return torch.cat(pieces, dim=1).transpose(0, 1).contiguous()


def _unseen(rows: int, before: int, window: int | None, beside: Tensor) -> Tensor:
    """[rows, before + rows], True where the query of a row may not look; its own position is `before` + row. Masks are
    kept for later calls, unless they go with a tensor that has a shape and no numbers (a plan's)."""
    make = _kept_mask if type(beside) is Tensor else _mask
    return make(rows, before, window)


def _mask(rows: int, before: int, window: int | None) -> Tensor:
    mask = torch.ones(rows, before + rows, dtype=torch.bool)
    return mask.triu(before + 1) if window is None else mask.triu(before + 1) | mask.tril(before - window)


_kept_mask = lru_cache(maxsize=64)(_mask)


Block = tuple[int, int, int, int]


def _blocks(
    lengths: Sequence[int], size: int, window: int | None, key_lengths: Sequence[int] | None = None
) -> list[Block]:
    """(first key, first query, end, more) of every block, as positions among the keys; the queries are `more` places
    further to the front among the queries."""
    blocks, begin, more = [], 0, 0
    for length, keys in zip(lengths, key_lengths or lengths, strict=True):
        end = begin + keys
        more += keys - length
        for first in range(end - length, end, size):
            seen_from = begin if window is None else max(begin, first + 1 - window)
            blocks.append((seen_from, first, min(first + size, end), more))
        begin = end
    return blocks


def pairs(lengths: Sequence[int], dtype: torch.dtype, window: int | None = None) -> int:
    """(query, key) pairs whose scores are made, in a forward in this dtype: those in the blocks, the masked ones
    included."""
    return sum((end - first) * (end - seen) for seen, first, end, _ in blocks(lengths, dtype, window))


def blocks(lengths: Sequence[int], dtype: torch.dtype, window: int | None = None) -> list[Block]:
    """(first key, first query, end, 0) of every block of a forward in this dtype, as positions in the stream."""
    return _blocks(lengths, BLOCK.get(dtype, 64), window)


def _probabilities(q: Tensor, k: Tensor, before: int, rows: int, window: int | None) -> Tensor:
    """softmax of the scores of a block: q [kv, G * rows, D], k [kv, before + rows, D] -> [kv, G * rows, keys]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    by_head = scores.unflatten(1, (-1, rows))
    if window is None:  # only the block on the diagonal has anything to hide
        by_head[..., before:].masked_fill_(_unseen(rows, 0, None, scores), -torch.inf)
    else:
        by_head.masked_fill_(_unseen(rows, before, window, scores), -torch.inf)
    return torch.softmax(scores, dim=-1)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float, window: int | None
    ) -> Tensor:
        heads, tokens, dim = query.shape
        kv, _, width = value.shape
        scaled = query * scale
        out_THD = torch.empty(tokens, heads, width, dtype=query.dtype)
        by_group = out_THD.view(tokens, kv, heads // kv, width).permute(1, 2, 0, 3)
        for seen, first, end, more in blocks:
            rows, mine = end - first, slice(first - more, end - more)
            q = scaled[:, mine].reshape(kv, -1, dim)
            probs = _probabilities(q, key[:, seen:end], first - seen, rows, window)
            by_group[:, :, mine] = torch.bmm(probs, value[:, seen:end]).view(kv, -1, rows, width)
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale, ctx.window = blocks, scale, window
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads, tokens, dim = query.shape
        kv, groups, width = key.shape[0], heads // key.shape[0], value.shape[-1]
        wide = torch.promote_types(key.dtype, torch.float32)  # many blocks add to one key
        scaled = query * ctx.scale
        grad = grad_outputs[0].view(tokens, kv, groups, width).permute(1, 2, 0, 3)
        dquery = torch.empty(heads, tokens, dim, dtype=query.dtype)
        by_group = dquery.view(kv, groups, tokens, dim)
        dkey, dvalue = (torch.zeros(x.shape, dtype=wide) for x in (key, value))
        for seen, first, end, more in ctx.blocks:
            rows, mine = end - first, slice(first - more, end - more)
            q, g = scaled[:, mine].reshape(kv, -1, dim), grad[:, :, mine].reshape(kv, -1, width)
            k, v = key[:, seen:end], value[:, seen:end]
            probs = _probabilities(q, k, first - seen, rows, ctx.window)
            dvalue[:, seen:end] += torch.bmm(probs.transpose(1, 2), g)
            dprobs = torch.bmm(g, v.transpose(1, 2))
            dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            by_group[:, :, mine] = torch.bmm(dscores, k).view(kv, groups, rows, dim)
            dkey[:, seen:end] += torch.bmm(dscores.transpose(1, 2), q)
        return dquery.mul_(ctx.scale), dkey.to(key.dtype), dvalue.to(value.dtype), None, None, None


class _Tiled(torch.autograd.Function):
    """The compiled form."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        from tunery.kernels import compiled

        out_THD, lse = compiled.attention_forward(query, key, value, bounds, key_bounds, scale, window)
        ctx.save_for_backward(query, key, value, out_THD, lse, bounds, key_bounds)
        ctx.scale, ctx.window = scale, window
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from tunery.kernels import compiled

        grads = compiled.attention_backward(grad_outputs[0], *ctx.saved_tensors, scale=ctx.scale, window=ctx.window)
        return (*grads, None, None, None, None)
