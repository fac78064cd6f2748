"""Attention over packed streams, through ONE hook registered in transformers' AttentionInterface.

The library builds no mask for a name it has no mask function for, so the sequence boundaries that policy.py passes as
`cu_seq_lens_q` are all there is. Back ends, best first: FlashAttention where installed, torch's own variable-length
attention on CUDA, blocked attention on a CPU (kernels/segment_attention.py), and a loop of scaled_dot_product_attention
over the sequences, which works everywhere and is the reference. Soft-capping (Gemma 2), attention sinks (gpt-oss) and
dropout take the explicit softmax."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunery.kernels import compiled, segment_attention
from tunery.kernels.shared_keys import shared_keys

NAME = "tunery"
REFERENCE = "tunery_reference"
RECORDING = "tunery_recording"


def register(reference: bool = False) -> str:
    """Make the hook known to transformers; returns the name to pass as `attn_implementation`. `reference`: the one that
    never takes a fast back end."""
    from transformers import AttentionInterface

    for name, hook in HOOKS.items():
        AttentionInterface.register(name, hook)
    return REFERENCE if reference else NAME


@contextmanager
def recorded_attention(model: Any) -> Iterator[dict[torch.nn.Module, dict[str, Any]]]:
    """While it lasts, what each attention module of `model` hands to our hook besides the tensors and the boundaries is
    filled into the dict (empty where the model does not use our hook)."""
    from transformers import AttentionInterface

    recorded: dict[torch.nn.Module, dict[str, Any]] = {}
    before = model.config._attn_implementation
    if before not in HOOKS:
        yield recorded
        return

    def record(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        recorded[module] = {name: kwargs[name] for name in CONSTANTS if name in kwargs}
        return HOOKS[before](module, *args, **kwargs)

    AttentionInterface.register(RECORDING, record)
    set_attention(model, RECORDING)
    try:
        yield recorded
    finally:
        set_attention(model, before)


@contextmanager
def library_attention(model: Any) -> Iterator[None]:
    """The library's own attention instead of our hook for a while, for padded batches, caches and comparison. Models
    with soft-capped scores get "eager": the library's "sdpa" leaves the cap out."""
    before = model.config._attn_implementation
    capped = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    wanted = "sdpa" if before in HOOKS else before
    set_attention(model, "eager" if wanted == "sdpa" and capped else wanted)
    try:
        yield
    finally:
        set_attention(model, before)


def set_attention(model: Any, wanted: str | None) -> None:
    """Switch a loaded model's attention, to "eager" where its code does not know `wanted`."""
    before = model.config._attn_implementation
    if wanted is None or before == wanted:
        return
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError):
        if wanted == "eager":
            raise
        model.set_attn_implementation("eager")
    for module in model.modules():  # PEFT's copies of whole modules have copies of the config as well
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == before:
            config._attn_implementation = model.config._attn_implementation


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    segment_lengths: list[int] | None = None,
    segment_continues: list[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fast: bool = True,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the stream.

    query [1, heads, T, D]; key, value [1, kv_heads, T, D]; cu_seq_lens_q int32 [R + 1] (None: one sequence);
    segment_lengths the same boundaries as lengths on the host, so that nobody waits for the device to ask for them;
    segment_continues (of Batch.continues) where such a piece is not a whole sequence: then its queries see all of the
    piece it continues and of what that continues, and a sliding window counts over them.
    Returns ([1, T, heads, D], None). Raises ValueError for a padded batch, of which there are none here, and for
    attention to chosen positions."""
    if query.shape[0] != 1 or attention_mask is not None:
        raise ValueError("packed attention takes one unpadded stream, not a padded batch")
    sparse = [name for name in UNKNOWN if rest.get(name) is not None]
    if sparse:  # or a choice of positions would be passed over in silence
        raise ValueError(f"packed attention knows no {', '.join(sparse)}")
    if cu_seq_lens_q is None:
        max_length_q = query.shape[2]
        segment_lengths = [max_length_q]
        cu_seq_lens_q = torch.arange(0, max_length_q + 1, max_length_q, dtype=torch.int32, device=query.device)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave float32 queries and keys beside 16-bit values where the weights are float32.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    lengths: list[int] = segment_lengths or cu_seq_lens_q.diff().tolist()
    key_lengths: list[int] | None = None
    cu_keys = cu_seq_lens_q
    if segment_continues:
        shared = shared_keys(lengths, segment_continues, query.device)
        key, value = shared.gather(key[0])[None], shared.gather(value[0])[None]
        lengths, key_lengths = shared.queries, shared.keys
        cu_seq_lens_q, cu_keys, max_length_q = shared.cu_queries, shared.cu_keys, None
    if softcap is not None or s_aux is not None or dropout > 0.0:
        options = (scale, dropout, sliding_window, softcap, s_aux)
        return _explicit(query, key, value, lengths, key_lengths or lengths, *options), None
    fused = _fused(query, value, several=key_lengths is not None) if fast else None
    if fused is not None:
        longest = max_length_q or max(lengths)
        bounds = (cu_seq_lens_q, cu_keys, longest, max(key_lengths) if key_lengths else longest)
        window = (sliding_window - 1 if sliding_window else -1, 0)
        q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
        return fused(q_THD, k_THD, v_THD, *bounds, scale, window)[None], None
    inputs = (query[0], key[0], value[0], lengths, scale, sliding_window)
    if fast and query.device.type == "cpu":
        ready = compiled.ready()
        return segment_attention.segment_attention(*inputs, compiled=ready, key_lengths=key_lengths)[None], None
    return segment_attention.reference(*inputs, key_lengths)[None], None


HOOKS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    NAME: packed_attention,
    REFERENCE: partial(packed_attention, fast=False),
}
# What a module's own code decides, as against what comes with a batch.
CONSTANTS = ("scaling", "sliding_window", "softcap", "s_aux")


# What sparse attention (DeepSeek's, MiniMax's) hands over beside the tensors.
UNKNOWN = ("block_indices", "indices", "topk_indices", "index_mask", "head_mask", "position_bias")


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], key_lengths: list[int], scale: float, dropout: float,
    window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention with the scores written out, one sequence after the other, of which the queries are the last:
    [1, T, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    keys, values = key.split(key_lengths, dim=2), value.split(key_lengths, dim=2)
    pieces = [
        _one_sequence(q, k, v, scale, dropout, window, softcap, sinks)
        for q, k, v in zip(query.split(lengths, dim=2), keys, values, strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [1, heads, S, D], the last of the S' places of k and v [1, heads, S', D] -> [1, heads, S, D]."""
    length = k.shape[2]
    before = length - q.shape[2]
    seen = torch.ones(q.shape[2], length, dtype=torch.bool, device=q.device).tril(before)
    if window is not None and window < length:
        seen = seen.triu(before + 1 - window)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:  # one learned extra logit a head, which takes probability and gives nothing
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=wide)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1, dtype=wide)
    return F.dropout(probs.to(q.dtype), dropout) @ v


def _fused(query: Tensor, value: Tensor, several: bool) -> Any | None:
    """The back end for these tensors, or None. `several`: there are more keys than queries."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or value.shape[-1] != query.shape[-1]:
        return None
    fused = _fused_backend(query.shape[-1])
    return None if fused is None or (several and not _ends_together(query.shape[-1], query.device)) else fused


@lru_cache
def _ends_together(head_dim: int, device: torch.device) -> bool:
    """Whether the back end lets the last query of a sequence see its last key where there are more keys than queries
    (some let the first see the first alone): measured, on a query that would see two keys or three."""
    fused = _fused_backend(head_dim)
    assert fused is not None
    q = torch.ones(2, 1, head_dim, dtype=torch.bfloat16, device=device)
    v = torch.tensor([0.0, 0.0, 1.0], device=device, dtype=q.dtype)[:, None, None].expand(3, 1, head_dim)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (2, 3))
    try:
        with torch.no_grad():
            out = fused(q, torch.ones_like(v), v, cu_q, cu_k, 2, 3, 1.0, (-1, 0))
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = torch.tensor([0.0, 1 / 3], device=device)[:, None, None].expand(2, 1, head_dim)
    return bool(torch.allclose(out.float(), expected, atol=0.01))


@lru_cache
def _fused_backend(head_dim: int) -> Any | None:
    """A function (q [T, heads, D], k, v [K, kv_heads, D], their cu_seqlens, their max_seqlen, scale, window) ->
    [T, heads, D], or None."""
    if head_dim > 256 or head_dim % 8:
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        def flash(
            q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, scale: float,
            window: tuple[int, int],
        ) -> Tensor:  # fmt: skip
            return flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, most_q, most_k, softmax_scale=scale, causal=True, window_size=window
            )

        return flash
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "scale" not in parameters or "window_size" not in parameters:
        return None
    grouped = "enable_gqa" in parameters

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, scale: float,
        window: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if not grouped and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        result = varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), cu_q, cu_k, most_q, most_k,
            scale=scale, window_size=window, **options,
        )  # fmt: skip
        return result[0] if isinstance(result, tuple) else result

    return varlen
