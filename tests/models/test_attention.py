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


# Two answers to a prompt of 6 tokens between two whole sequences, and where each token stands once all are whole.
LENGTHS, CONTINUES = [4, 6, 3, 5, 2], [-1, -1, 1, 1, -1]
WHOLE = [*range(13), *range(4, 10), *range(13, 20)]
OWN = [*range(13), *range(19, 26)]  # the answers, and one copy of the prompt


def shared_and_whole(q, k, v, **options):
    """The stream with the prompt once, and with every sequence whole: the same rows of both."""
    cu, whole = (torch.tensor([0, *n]).cumsum(0).to(q.device, torch.int32) for n in (LENGTHS, [4, 9, 11, 2]))
    shared, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=cu, segment_lengths=LENGTHS, segment_continues=CONTINUES,
        **options,
    )  # fmt: skip
    q, k, v = (x[:, :, WHOLE] for x in (q, k, v))
    expected, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=whole, **options)
    return shared, expected[:, OWN]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [False, True])
def test_what_a_piece_continues_is_seen_by_every_variant(window, softcap, sink, fast):
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, 20, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, KV, 20, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"sliding_window": window, "softcap": softcap, "fast": fast}
    both = shared_and_whole(q, k, v, s_aux=torch.randn(HEADS, dtype=torch.float64) if sink else None, **options)
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
    seed = torch.randn_like(both[0])
    grads = [torch.autograd.grad((out * seed).sum(), [q, k, v]) for out in both]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("right", [True, False])
def test_a_back_end_that_lines_sequences_up_by_their_first_tokens_is_not_asked(monkeypatch, right):
    """With more keys than queries, some libraries let the first query see the first key alone."""
    asked = []

    def back_end(q, k, v, cu_q, cu_k, longest, longest_keys, scale, window):
        asked.append((cu_q.tolist(), cu_k.tolist(), longest, longest_keys))
        lengths, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
        q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
        if right:
            return attention.segment_attention.reference(q, k, v, lengths, scale, None, keys).to(torch.bfloat16)
        first = torch.cat([torch.arange(n) + s for n, s in zip(lengths, cu_k.tolist(), strict=False)])
        return attention.segment_attention.reference(q, k[:, first], v[:, first], lengths, scale).to(torch.bfloat16)

    monkeypatch.setattr(attention, "_fused_backend", lambda head_dim: back_end)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    attention._ends_together.cache_clear()
    q, k, v = (torch.randn(1, h, 20, 16, dtype=torch.bfloat16) for h in (HEADS, KV, KV))
    packed_attention(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=torch.tensor([0, 4, 10, 13, 18, 20], dtype=torch.int32),
        segment_lengths=LENGTHS, segment_continues=CONTINUES,
    )  # fmt: skip
    attention._ends_together.cache_clear()
    probe, *streams = asked
    assert probe == ([0, 2], [0, 3], 2, 3)
    assert streams == ([([0, 4, 13, 18, 20], [0, 4, 13, 24, 26], 9, 11)] if right else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_fused_back_end_sees_what_a_piece_continues(window):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 20, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (HEADS, KV, KV)
    )
    both = shared_and_whole(q, k, v, sliding_window=window)
    torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)
    grads = [torch.autograd.grad(out.float().sin().sum(), [q, k, v]) for out in both]
    torch.testing.assert_close(*grads, rtol=3e-2, atol=3e-2)
