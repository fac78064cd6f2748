"""Are the fast paths right on this device? Each against a plain computation in float64, values and gradients, on
random inputs: `python -m bench.gpu --check`. On a machine without CUDA the paths of the CPU are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative errors ||x - reference|| / ||reference|| that rounding may cause: of one operation on operands rounded to
# the dtype, and of a whole model's loss and gradients.
OPERATION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
MODEL = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
LENGTHS = (700, 1, 130, 64, 333)


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
        yield from _linear_cross_entropy(device, dtype)
        yield from _packed(device, dtype)


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

    lengths = torch.tensor(LENGTHS)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    total = int(lengths.sum())
    module = torch.nn.Module()

    def hook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = attention.packed_attention(
            module, q[None], k[None], v[None], None, cu_seq_lens_q=boundaries, max_length_q=max(LENGTHS),
            sliding_window=window,
        )  # fmt: skip
        return out[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over the whole stream, [T, heads, D]: masked to the same sequence, the past and the window."""
        sequence = torch.arange(len(LENGTHS), device=device).repeat_interleave(lengths.to(device))
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

    rows, hidden, vocabulary = 300, 256, 32000
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


def _packed(device: str, dtype: torch.dtype) -> Iterator[Check]:
    """A small Llama's loss and gradients on one packed stream, by the policy, against the library's own forward in
    float64 with the same weights, one sequence at a time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tunery.data.collate import collate
    from tunery.models.load import hook_attention
    from tunery.policy import CausalPolicy

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        exact: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    exact.load_state_dict(model.state_dict())
    hook_attention(model)
    sequences = _sequences(1000)
    batch = collate(sequences).to(device)
    policy = CausalPolicy(model, dtype=dtype)
    what = f"packed loss and gradients of a small Llama, {str(dtype).removeprefix('torch.')}"
    if not policy.packs:
        yield Check(f"{what}: {'; '.join(policy.notes)}", math.nan, 0.0)
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
