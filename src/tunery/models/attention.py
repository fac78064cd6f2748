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

from tunery.kernels import segment_attention

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    fast: bool = True,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the stream.

    query [1, heads, T, D]; key, value [1, kv_heads, T, D]; cu_seq_lens_q int32 [R + 1] (None: one sequence);
    segment_lengths the same boundaries as lengths on the host, so that nobody waits for the device to ask for them.
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
    if softcap is not None or s_aux is not None or dropout > 0.0:
        return _explicit(query, key, value, lengths, scale, dropout, sliding_window, softcap, s_aux), None
    if fast and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        fused = _fused_backend(query.shape[-1]) if value.shape[-1] == query.shape[-1] else None
        if fused is not None:
            if max_length_q is None:
                max_length_q = max(lengths)
            window = (sliding_window - 1 if sliding_window else -1, 0)
            q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
            return fused(q_THD, k_THD, v_THD, cu_seq_lens_q, max_length_q, scale, window)[None], None
    blocked = fast and query.device.type == "cpu"
    attend = segment_attention.segment_attention if blocked else segment_attention.reference
    return attend(query[0], key[0], value[0], lengths, scale, sliding_window)[None], None


HOOKS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    NAME: packed_attention,
    REFERENCE: partial(packed_attention, fast=False),
}
# What a module's own code decides, as against what comes with a batch.
CONSTANTS = ("scaling", "sliding_window", "softcap", "s_aux")


# What sparse attention (DeepSeek's, MiniMax's) hands over beside the tensors.
UNKNOWN = ("block_indices", "indices", "topk_indices", "index_mask", "head_mask", "position_bias")


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, dropout: float, window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention with the scores written out, one sequence after the other: [1, T, heads, D]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    pieces = [
        _one_sequence(q, k, v, scale, dropout, window, softcap, sinks)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[1, heads, S, D] each -> [1, heads, S, D]."""
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if window is not None and window < length:
        seen = seen.triu(1 - window)
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


@lru_cache
def _fused_backend(head_dim: int) -> Any | None:
    """A function (q, k, v [T, heads, D], cu_seqlens, max_seqlen, scale, window) -> [T, heads, D], or None."""
    if head_dim > 256 or head_dim % 8:
        return None
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        def flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: tuple) -> Tensor:
            return flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=window
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

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: tuple) -> Tensor:
        options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        if not grouped and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        result = varlen_attn(
            q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, longest, longest,
            scale=scale, window_size=window, **options,
        )  # fmt: skip
        return result[0] if isinstance(result, tuple) else result

    return varlen
