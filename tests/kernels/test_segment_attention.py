"""Blocked attention over packed streams. Oracle: torch's scaled_dot_product_attention, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from tunery.kernels import compiled
from tunery.kernels import segment_attention as segments
from tunery.kernels.segment_attention import reference, segment_attention

needs_compiler = pytest.mark.skipif(not compiled.ready(), reason="needs Linux and a C++ compiler")

SHAPES = [(8, 2, 16), (4, 4, 8), (6, 1, 32)]
STREAMS = [[1], [5], [64, 1, 63, 65], [200, 130], [300]]


def tensors(heads, kv, dim, tokens, dtype=torch.float64):
    make = torch.Generator().manual_seed(tokens + heads)
    shapes = [(heads, tokens, dim), (kv, tokens, dim), (kv, tokens, dim)]
    # as models hand them over: views of [T, heads, D]
    return [
        torch.randn(t, h, d, generator=make, dtype=torch.float64).to(dtype).requires_grad_().transpose(0, 1)
        for h, t, d in shapes
    ]


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("lengths", STREAMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_equal_one_by_one(shape, lengths, window):
    inputs = tensors(*shape, sum(lengths))
    results = []
    for function in (segment_attention, reference):
        out = function(*inputs, lengths, 0.3, window)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("lengths", [*STREAMS, [70] * 9], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "width"), [(8, 2, 16, 16), (4, 4, 64, 48), (6, 1, 80, 96), (2, 1, 256, 128)]
)
def test_the_compiled_form_equals_float64(heads, kv, dim, width, lengths, window, dtype):
    """Odd lengths, windows that begin within a tile, sums over the heads of a group in one pass and in several."""
    query, key, value = tensors(heads, kv, dim, sum(lengths), dtype)
    value = value.repeat(1, 1, 2)[..., :width].detach().requires_grad_()
    if dtype == torch.bfloat16 and not compiled.takes_attention(query, key, value):
        pytest.skip("a processor that does not multiply bfloat16")
    rough, exact = [], []
    for inputs, into, function in (
        ((query, key, value), rough, lambda *a: segment_attention(*a, lengths, 0.1, window, compiled=True)),
        ((query.double(), key.double(), value.double()), exact, lambda *a: reference(*a, lengths, 0.1, window)),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.linspace(-9, 9, out.numel(), dtype=torch.float64).sin().view_as(out).to(dtype).to(out.dtype)
        into += [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
        # a window of 1 has no gradient of queries and keys at all: what is left is the rounding of what cancels
        size = theirs.norm() if window != 1 and lengths != [1] else exact[0].norm()
        assert float((ours.double() - theirs).norm()) <= tolerance * float(size)


@needs_compiler
def test_what_the_compiled_form_does_not_take_goes_the_other_way():
    odd = tensors(4, 2, 8, 10, torch.float32)
    assert torch.equal(segment_attention(*odd, [4, 6], 0.5, compiled=True), segment_attention(*odd, [4, 6], 0.5))
    exact = tensors(4, 2, 16, 10)
    assert torch.equal(segment_attention(*exact, [4, 6], 0.5, compiled=True), segment_attention(*exact, [4, 6], 0.5))


@needs_compiler
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_a_number_stays_so(where):
    inputs = [x.detach().clone() for x in tensors(4, 2, 16, 70, torch.float32)]
    inputs[where][:, 5, 3] = torch.nan
    out = segment_attention(*inputs, [70], 0.5, compiled=True)
    assert out[5].isnan().any()
    assert where == 2 or out[:5].isfinite().all()  # nothing times what is not a number is not nothing


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_all_overflow_have_no_softmax(dtype):
    """Finite queries and keys, products of -inf: torch's operations make NaN of it, and so must the compiled form. The
    third query sees a key with a finite score."""
    query, key, value = (x.detach().to(dtype) for x in tensors(1, 1, 16, 3, torch.float32))
    query, key = torch.full_like(query, 1e20), torch.full_like(key, -1e20)
    key[:, 2] = 0
    out = segment_attention(query, key, value, [3], 1.0, compiled=True)
    assert out[:2].isnan().all() and torch.equal(out[2], value[:, 2])
    query.requires_grad_()
    out = segment_attention(query, key, value, [3], 1.0, compiled=True)
    assert torch.autograd.grad(out.sum(), query)[0][:, :2].isnan().all()


@pytest.mark.parametrize("compile_", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize(
    ("lengths", "key_lengths"), [([4, 7], None), ([4, 5], None), ([4, 6], [4, 7]), ([4, 6], [4, 5])], ids=str
)
def test_lengths_that_do_not_add_up(lengths, key_lengths, compile_):
    inputs = tensors(4, 2, 16, 10, torch.float32)
    with pytest.raises(ValueError, match="in all, where there are 10 and 10"):
        segment_attention(*inputs, lengths, 0.5, compiled=compile_, key_lengths=key_lengths)


@needs_compiler
def test_heads_that_make_no_groups_are_refused():
    query, (_, key, value) = tensors(5, 2, 16, 10, torch.float32)[0], tensors(4, 2, 16, 10, torch.float32)
    with pytest.raises(RuntimeError, match="shape"):
        segment_attention(query, key, value, [10], 0.5, compiled=True)


def test_values_may_be_narrower_than_keys():
    """DeepSeek's latent attention has 24 numbers a key and 16 a value. Oracle: torch's, as above."""
    query, key, _ = tensors(4, 2, 24, 100)
    value = torch.randn(100, 2, 16, dtype=torch.float64, requires_grad=True).transpose(0, 1)
    results = []
    for function in (segment_attention, reference):
        out = function(query, key, value, [70, 30], 0.3)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [query, key, value])])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


def test_result_is_contiguous_and_ready_for_the_output_projection():
    out = segment_attention(*tensors(4, 2, 8, 10), [3, 7], 0.5)
    assert out.shape == (10, 4, 8) and out.is_contiguous()


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_bfloat16_is_as_near_to_float64_as_the_library_in_bfloat16(spread, compiles):
    """The eager attention of transformers rounds its scores to 16 bits too; ours may be no worse."""
    exact_inputs = tensors(8, 2, 64, 300)
    lengths, scale = [180, 120], 0.125
    rough_inputs = [(x * spread).detach().to(torch.bfloat16).requires_grad_() for x in exact_inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in rough_inputs]
    exact = reference(*exact_inputs, lengths, scale)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [exact, *torch.autograd.grad(exact, exact_inputs, upstream)]

    def errors(function):
        out = function(*rough_inputs)
        got = [out, *torch.autograd.grad(out, rough_inputs, upstream.to(torch.bfloat16))]
        return [
            float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            for a, b in zip(got, wanted, strict=True)
        ]

    ours = errors(lambda q, k, v: segment_attention(q, k, v, lengths, scale, None, compiles))
    eager = errors(lambda q, k, v: _eager(q, k, v, lengths, scale))
    assert all(a <= 1.2 * b for a, b in zip(ours, eager, strict=True)), (ours, eager)


def _eager(query, key, value, lengths, scale):
    """transformers' eager attention (softmax in float32, cast back), per sequence."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    pieces = []
    for q, k, v in zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        pieces.append(probs @ v)
    return torch.cat(pieces, 1).transpose(0, 1)


def test_only_the_inputs_are_kept_for_the_backward():
    inputs = tensors(4, 2, 8, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        segment_attention(*inputs, [300], 0.5)
    assert sorted(kept) == sorted(x.numel() for x in inputs)


@pytest.mark.parametrize("window", [None, 3])
def test_a_call_on_shapes_leaves_nothing_to_real_ones_nor_takes_of_theirs(window):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def call() -> torch.Tensor:
        query, key, value = tensors(4, 2, 8, 11)
        return segment_attention(query, key, value, [4, 7], 0.5, window)

    segments._kept_mask.cache_clear()
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(call(), FakeTensor)
        assert type(call()) is torch.Tensor
