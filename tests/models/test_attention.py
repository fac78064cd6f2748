"""Oracle: softmax attention written out with a mask per sequence, in float64."""

from __future__ import annotations

import pytest
import torch

from tunery.models import attention
from tunery.models.attention import packed_attention

HEADS, KV, D = 4, 2, 8


def by_definition(q, k, v, bounds, scale, window, softcap, sinks):
    """out_i = sum_j softmax_j(cap(scale q_i k_j)) v_j over j <= i of the same sequence within the window."""
    length = q.shape[2]
    owner = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (owner[:, None] == owner[None]) & (j <= i)
    if window:
        seen &= i - j < window
    k, v = (x.repeat_interleave(HEADS // KV, dim=1) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.reshape(1, -1, 1, 1).exp()
    return ((weights / total) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_every_variant_equals_the_definition(window, softcap, sink):
    torch.manual_seed(0)
    bounds = [0, 5, 6, 17]
    q = torch.randn(1, HEADS, 17, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, KV, 17, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(HEADS, dtype=torch.float64) if sink else None
    cu = torch.tensor(bounds, dtype=torch.int32)
    out, none = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, cu_seq_lens_q=cu, sliding_window=window, softcap=softcap,
        s_aux=sinks,
    )  # fmt: skip
    expected = by_definition(q, k, v, bounds, 0.3, window, softcap, sinks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    assert none is None
    seed = torch.randn_like(expected)
    mine = torch.autograd.grad((out * seed).sum(), [q, k, v])
    theirs = torch.autograd.grad((expected * seed).sum(), [q, k, v])
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_padded_batch_is_refused():
    x = torch.randn(2, HEADS, 4, D)
    with pytest.raises(ValueError, match="padded"):
        packed_attention(torch.nn.Module(), x, x, x, None)


def test_the_fused_back_end_is_called_causally_with_its_window(monkeypatch):
    """A window of w sees w - 1 tokens to the left and itself; without one, everything to the left."""
    from types import SimpleNamespace

    seen = []

    def back_end(q, k, v, cu_q, cu_k, longest, longest_keys, scale, window):
        assert cu_q is cu_k and longest == longest_keys
        seen.append((longest, window, q.dtype))
        return q

    monkeypatch.setattr(attention, "_fused_backend", lambda head_dim: back_end)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    x = torch.randn(1, HEADS, 6, D, dtype=torch.bfloat16)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    for window in (None, 3):
        packed_attention(SimpleNamespace(), x, x, x, None, cu_seq_lens_q=cu, sliding_window=window)
    assert seen == [(4, (-1, 0), torch.bfloat16), (4, (2, 0), torch.bfloat16)]


def test_autocast_reaches_queries_that_rotary_embeddings_left_in_float32():
    q, v = torch.randn(1, HEADS, 6, D), torch.randn(1, HEADS, 6, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(torch.nn.Module(), q, q, v, None)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7])
def test_the_fused_back_end_equals_the_loop(window):
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, 300, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, KV, 300, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cu = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    fast, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=cu, sliding_window=window)
    slow, _ = packed_attention(
        torch.nn.Module(), q.float(), k.float(), v.float(), None, cu_seq_lens_q=cu, sliding_window=window
    )
    torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-2)
