"""Are the fast paths right on this device? Each against a plain computation in float64, values and gradients, on
random inputs: `python -m bench.gpu --check`. On a machine without CUDA the paths of the CPU are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Relative errors ||x - reference|| / ||reference|| that rounding may cause: of one operation on operands rounded to
# the dtype, and of a whole model's loss and gradients.
OPERATION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MODEL = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LENGTHS = {"cuda": (700, 1, 130, 64, 333), "cpu": (150, 1, 64, 33)}  # of the sequences in a stream
SIZES = {"cuda": (1000, 2048, 32000), "cpu": (30, 256, 3000)}  # tokens, hidden size, vocabulary


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error found, and the one allowed."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # never so for NaN


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64; NaN where anything is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def run_checks(device: str | None = None) -> list[Check]:
    """All checks, printed as they are made."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    found = []
    for check in _all(device):
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.what:84} {check.error:.1e} (allowed {check.allowed:.0e})",
              flush=True)  # fmt: skip
        found.append(check)
    failed = sum(not check.passed for check in found)
    print(f"{len(found) - failed} of {len(found)} within what rounding may cause", flush=True)
    return found


def _all(device: str) -> Iterator[Check]:
    for dtype in (torch.bfloat16, torch.float32):
        for heads, kv_heads, dim, window in ((8, 2, 128, None), (4, 4, 64, None), (8, 2, 64, 100)):
            yield from _attention(device, dtype, heads, kv_heads, dim, window)
        for kernel in (_linear_cross_entropy, _norms, _rotary, _gates, _lora, _gated_lora):
            yield from kernel(device, dtype)
        for method in ("full", "lora"):
            yield from _packed(device, dtype, method)


# ---------------------------------------------------------------- each of them


def compared(
    what: str, fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[Check]:
    """`fast` on `inputs` in `dtype`, `plain` on the same rounded numbers in float64: the result, and the gradient of
    every input for a random upstream one."""
    low = [x.detach().to(dtype).requires_grad_() for x in inputs]
    high = [x.detach().double().requires_grad_() for x in low]
    out, expected = fast(*low), plain(*high)
    upstream = torch.randn_like(expected).to(out.dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    error = relative_error(out, expected)
    gradients = [
        relative_error(x.grad, y.grad) if x.grad is not None and y.grad is not None else math.nan
        for x, y in zip(low, high, strict=True)
    ]
    name = f"{what}, {str(dtype).removeprefix('torch.')}"
    yield Check(f"{name}: value", error, OPERATION[dtype])
    yield Check(f"{name}: gradients", max(gradients) if all(map(math.isfinite, gradients)) else math.nan,
                OPERATION[dtype])  # fmt: skip


def _attention(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, window: int | None
) -> Iterator[Check]:
    from tunery.models import attention

    longest = max(LENGTHS[device])
    lengths = torch.tensor(LENGTHS[device])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    total = int(lengths.sum())
    module = torch.nn.Module()

    def hook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = attention.packed_attention(
            module, q[None], k[None], v[None], None, cu_seq_lens_q=boundaries, max_length_q=longest,
            sliding_window=window,
        )  # fmt: skip
        return out[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over the whole stream, [T, heads, D]: masked to the same sequence, the past and the window."""
        sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths.to(device))
        place = torch.arange(total, device=device)
        back = place[:, None] - place[None]
        seen = (sequence[:, None] == sequence[None]) & (back >= 0) & (back < (window or total))
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * dim**-0.5).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)

    inputs = [torch.randn(n, total, dim, device=device) for n in (heads, kv_heads, kv_heads)]
    what = f"attention, {heads}/{kv_heads} heads of {dim}" + (f", window {window}" if window else "")
    yield from compared(what, hook, plain, inputs, dtype)


def _linear_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Check]:
    from tunery.kernels.linear_cross_entropy import linear_cross_entropy

    rows, hidden, vocabulary = SIZES[device]
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    weights = torch.rand(rows, device=device)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        nll = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
        return (nll * weights.double()).sum()

    inputs = [torch.randn(rows, hidden, device=device), 0.1 * torch.randn(vocabulary, hidden, device=device)]
    yield from compared(
        "linear cross-entropy, head trained",
        lambda h, w: linear_cross_entropy(h, w, targets, weights), plain, inputs, dtype,
    )  # fmt: skip


def _norms(device: str, dtype: torch.dtype) -> Iterator[Check]:
    from tunery.kernels import rms_norm

    rows, hidden, _ = SIZES[device]
    x, residual, weight = (torch.randn(n, device=device) for n in ((rows, hidden), (rows, hidden), (hidden,)))

    def with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(rms_norm.add_rms_norm(x, residual, weight, 1e-5))

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rms_norm.reference(x + residual, weight, 1e-5), x + residual])

    for name, offset, cast_first in (("RMS norm", 0.0, True), ("RMS norm, Gemma's", 1.0, False)):
        yield from compared(
            name, lambda x, w, o=offset, c=cast_first: rms_norm.rms_norm(x, w, 1e-5, o, c),
            lambda x, w, o=offset, c=cast_first: rms_norm.reference(x, w, 1e-5, o, c), [x, weight], dtype,
        )  # fmt: skip
    yield from compared("RMS norm after a residual", with_residual, plain, [x, residual, weight], dtype)


def _rotary(device: str, dtype: torch.dtype) -> Iterator[Check]:
    from tunery.kernels import rotary

    tokens, dim = SIZES[device][0], 128
    angles = torch.rand(1, tokens, dim // 2, device=device).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turned(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rotary.rotary(q, k, cos, sin), dim=1)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([rotary.reference(x, cos.double(), sin.double()) for x in (q, k)], dim=1)

    inputs = [torch.randn(1, tokens, heads, dim, device=device).transpose(1, 2) for heads in (8, 2)]
    yield from compared("rotary embedding", turned, plain, inputs, dtype)


def _gates(device: str, dtype: torch.dtype) -> Iterator[Check]:
    from tunery.kernels import swiglu

    rows, hidden, _ = SIZES[device]
    inputs = [torch.randn(rows, hidden, device=device) for _ in range(2)]
    for title, activation in (("SwiGLU", "silu"), ("GeGLU", "gelu_tanh")):
        ours, plain = (partial(f, activation=activation) for f in (swiglu.gated, swiglu.reference))
        yield from compared(title, ours, plain, inputs, dtype)


def _lora(device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Three projections of one input, as an attention layer has them."""
    from tunery.kernels.lora import Projection, lora_linear, reference

    rows, hidden, _ = SIZES[device]
    widths = (hidden, hidden // 4, hidden // 4)
    weights = [torch.randn(n, hidden, device=device).to(dtype) / hidden**0.5 for n in widths]

    def run(function: Callable[..., Any], x: Tensor, *adapters: Tensor) -> Tensor:
        As, Bs = adapters[0::2], adapters[1::2]
        group = [Projection(w.to(x.dtype), None, A, B, 2.0) for w, A, B in zip(weights, As, Bs, strict=True)]
        return torch.cat(function(x, group), dim=-1)

    inputs = [torch.randn(rows, hidden, device=device)]
    for width in widths:
        inputs += [torch.randn(16, hidden, device=device) / hidden**0.5, torch.randn(width, 16, device=device)]
    yield from compared("LoRA, three projections", partial(run, lora_linear), partial(run, reference), inputs, dtype)


def _gated_lora(device: str, dtype: torch.dtype) -> Iterator[Check]:
    """A gated activation as part of the projection behind it, which makes it again in the backward."""
    from tunery.kernels import swiglu
    from tunery.kernels.lora import Projection, gated_lora_linear, reference

    rows, hidden, _ = SIZES[device]
    weight = torch.randn(hidden, hidden, device=device).to(dtype) / hidden**0.5

    def down(x: Tensor, A: Tensor, B: Tensor) -> Projection:
        return Projection(weight.to(x.dtype), None, A, B, 2.0)

    inputs = [torch.randn(rows, hidden, device=device) for _ in range(2)]
    inputs += [torch.randn(16, hidden, device=device) / hidden**0.5, torch.randn(hidden, 16, device=device)]
    for title, activation in (("SwiGLU", "silu"), ("GeGLU", "gelu_tanh")):

        def ours(gate: Tensor, up: Tensor, A: Tensor, B: Tensor, activation: str = activation) -> Tensor:
            return gated_lora_linear(gate, up, down(gate, A, B), activation)

        def plain(gate: Tensor, up: Tensor, A: Tensor, B: Tensor, activation: str = activation) -> Tensor:
            return reference(swiglu.reference(gate, up, activation), [down(gate, A, B)])[0]

        yield from compared(f"{title} before LoRA", ours, plain, inputs, dtype)


def _packed(device: str, dtype: torch.dtype, method: str) -> Iterator[Check]:
    """A small Llama's loss and gradients on one packed stream, through all of Tunery's fast paths, against the
    library's own forward in float64 with the same weights, one sequence at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunery.config import validate
    from tunery.data.collate import collate
    from tunery.kernels import KernelsConfig
    from tunery.models.fuse import fuse
    from tunery.models.load import hook_attention
    from tunery.models.parts import unwrap
    from tunery.policy import CausalPolicy

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.device(device):
        # as it trains: what is frozen in `dtype`, what trains in float32
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype if method == "lora" else torch.float32)
    if method == "lora":
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, lora)
    exact = copy.deepcopy(model).double()
    unwrap(exact).set_attn_implementation("eager")
    hook_attention(unwrap(model))
    fused = fuse(model, validate(KernelsConfig, {}), dtype)
    sequences = _sequences(1000)
    batch = collate(sequences).to(device)
    policy = CausalPolicy(model, dtype=dtype)
    what = f"all of a small Llama, packed, {method}, {str(dtype).removeprefix('torch.')}"
    notes = [*policy.notes, *sorted(fused.refused)]
    if not policy.packs or policy.parts is None or fused.refused:
        yield Check(f"{what}: left fast paths out: {'; '.join(notes)}", math.nan, 0.0)
        return
    loss = policy.nll(batch)
    loss.backward()
    expected = torch.zeros((), dtype=torch.float64, device=device)
    for tokens in sequences:
        ids = torch.from_numpy(tokens.ids).long().to(device)
        logps = exact(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        weights = torch.from_numpy(tokens.weights[1:]).to(device)
        expected = expected - (logps.gather(1, ids[1:, None])[:, 0] * weights).sum()
    expected.backward()
    mine, theirs = (
        torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None]) for m in (model, exact)
    )
    yield Check(f"{what}: value", relative_error(loss, expected), MODEL[dtype])
    yield Check(f"{what}: gradients", relative_error(mine, theirs), MODEL[dtype])


def _sequences(vocabulary: int) -> list[Any]:
    import numpy as np

    from tunery.types import Tokens

    random = np.random.default_rng(0)
    return [
        Tokens(random.integers(3, vocabulary, n).astype(np.int32), (random.random(n) < 0.6).astype(np.float32))
        for n in (200, 31, 64, 1, 118)
    ]
