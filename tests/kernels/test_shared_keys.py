"""Pieces that continue others. Oracle: softmax attention written out in float64, with a mask from what each token's
sequence is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.kernels import compiled
from tunery.kernels.segment_attention import reference, segment_attention
from tunery.kernels.shared_keys import shared_keys

CPU = torch.device("cpu")


def by_definition(q, k, v, lengths, continues, scale, window):
    """out_i = sum_j softmax_j(scale q_i k_j) v_j over the j that come before i in its sequence."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    seen = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    before: list[list[int]] = []  # of each piece, what its sequence has up to its end
    for piece, earlier in enumerate(continues):
        own = list(range(bounds[piece], bounds[piece + 1]))
        before.append((before[earlier] if earlier >= 0 else []) + own)
        for i in own:
            place = before[piece].index(i)
            seen[i, before[piece][max(0, place + 1 - window) if window else 0 : place + 1]] = True
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def attend(function, q, k, v, lengths, continues, scale, window):
    layout = shared_keys(lengths, continues, CPU)
    return function(q, layout.gather(k), layout.gather(v), layout.queries, scale, window, key_lengths=layout.keys)


STREAMS = {
    "two answers": ([9, 4, 6], [-1, 0, 0]),
    "four answers": ([20, 1, 7, 3, 2], [-1, 0, 0, 0, 0]),
    "one answer": ([9, 4], [-1, 0]),
    "among whole sequences": ([5, 9, 4, 6, 3, 8, 1, 70], [-1, -1, 1, 1, -1, -1, 5, 5]),
    "a tree": ([8, 3, 5, 4, 2], [-1, 0, 1, 1, 0]),
    "over several blocks": ([130, 70, 200], [-1, 0, 0]),
}


@pytest.mark.parametrize("function", [reference, segment_attention])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("stream", list(STREAMS))
def test_value_and_gradient_equal_the_definition(stream, window, function):
    lengths, continues = STREAMS[stream]
    check(function, lengths, continues, window)


def check(function, lengths, continues, window, heads=4, kv=2):
    torch.manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), h, 8, dtype=torch.float64).transpose(0, 1).requires_grad_() for h in (heads, kv, kv)
    ]
    ours = attend(function, *inputs, lengths, continues, 0.4, window)
    wanted = by_definition(*inputs, lengths, continues, 0.4, window)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(wanted)
    mine, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (ours, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@st.composite
def streams(draw):
    """Lengths, and for each piece but the first none or any earlier one that it continues."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    return lengths, [draw(st.integers(-1, number - 1)) for number in range(len(lengths))]


@settings(max_examples=60, deadline=None)
@given(stream=streams(), window=st.none() | st.integers(1, 20), shape=st.sampled_from([(4, 2), (3, 3), (4, 1)]))
def test_any_stream_equals_the_definition(stream, window, shape):
    for function in (reference, segment_attention):
        check(function, *stream, window, *shape)


@pytest.mark.skipif(not compiled.ready(), reason="needs Linux and a C++ compiler")
@settings(max_examples=40, deadline=None)
@given(
    answers=st.lists(st.integers(1, 150), min_size=1, max_size=4), prompt=st.integers(1, 200), after=st.integers(1, 80),
    window=st.none() | st.integers(2, 200), shape=st.sampled_from([(4, 2, 16), (2, 2, 48), (6, 1, 64)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_the_compiled_form_equals_float64(answers, prompt, after, window, shape, dtype):
    """Queries that begin anywhere within a tile of keys."""
    heads, kv, dim = shape
    lengths, continues = [prompt, *answers, after], [-1, *[0] * len(answers), -1]
    make = torch.Generator().manual_seed(prompt)
    inputs = [torch.randn(sum(lengths), h, dim, generator=make).to(dtype).transpose(0, 1) for h in (heads, kv, kv)]
    if not compiled.takes_attention(*inputs):
        pytest.skip("a processor that does not multiply bfloat16")
    results = []
    for wide in (False, True):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
        function = reference if wide else partial(segment_attention, compiled=True)
        out = attend(function, *leaves, lengths, continues, 0.2, window)
        upstream = torch.linspace(-9, 9, out.numel()).sin().view_as(out).to(dtype).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        # short sequences have small gradients of queries and keys: what is left is the rounding of what cancels
        error = float((ours.double() - exact).norm() / max(exact.norm(), results[1][0].norm()))
        assert error <= {torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]


def test_only_what_does_not_stand_behind_its_beginning_is_copied():
    layout = shared_keys([9, 4, 6, 5], [-1, 0, 0, -1], CPU)
    assert (layout.queries, layout.keys) == ([13, 6, 5], [13, 15, 5])
    assert layout.cu_queries.tolist() == [0, 13, 19, 24] and layout.cu_keys.tolist() == [0, 13, 28, 33]
    assert layout.places.tolist() == [*range(13), *range(9), *range(13, 19), *range(19, 24)]


def test_gradients_of_copies_are_summed_in_32_bits():
    """Sixteen times 1 beside 256 is 272; added one by one in bfloat16, each 1 would be lost."""
    layout = shared_keys([8, *[8] * 17], [-1, *[0] * 17], CPU)
    x = torch.zeros(1, 8 * 18, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.ones(1, len(layout.places), 1, dtype=torch.bfloat16)
    upstream[:, :8] = 256
    (grad,) = torch.autograd.grad(layout.gather(x), x, upstream)
    assert grad[0, :8, 0].tolist() == [272.0] * 8
