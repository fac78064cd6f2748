"""Oracle: the unchunked forward with autograd, in float64, and F.cross_entropy by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tunery.kernels import compiled
from tunery.kernels import linear_cross_entropy as kernel
from tunery.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy, reference

needs_compiler = pytest.mark.skipif(not compiled.ready(), reason="needs Linux and a C++ compiler")


def inputs(n: int = 37, v: int = 53, h: int = 16, dtype: torch.dtype = torch.float64, bias: bool = False) -> list:
    torch.manual_seed(0)
    h_NH = torch.randn(n, h, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, requires_grad=True)
    b = torch.randn(v, dtype=dtype, requires_grad=True) if bias else None
    return [h_NH, weight, torch.randint(0, v, (n,)), torch.rand(n) * 2, b]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 3.0)])
def test_value_and_gradients_equal_the_reference(monkeypatch, bias, scale, softcap):
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", {"cpu": 53 * 5})  # several chunks, the last one not full
    monkeypatch.setattr(kernel, "FEWEST_ROWS", 1)
    results = []
    for function in (linear_cross_entropy, reference):
        h, w, y, weights, b = inputs(bias=bias)
        loss = function(h, w, y, weights, b, scale, softcap)
        (loss * 0.7).backward()
        results.append((loss, h.grad, w.grad, b.grad if bias else torch.zeros(1)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("vocabulary", [7, 53, 160])
def test_the_compiled_softmax_is_as_near_to_float64_as_torchs(monkeypatch, vocabulary, scale, dtype):
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", {"cpu": vocabulary * 5})
    monkeypatch.setattr(kernel, "FEWEST_ROWS", 1)
    results = []
    for number, choice in ((torch.float64, {}), (dtype, {}), (dtype, {"compiled": True})):
        h, w, y, weights, _ = inputs(v=vocabulary)
        leaves = [x.detach().to(dtype).to(number).requires_grad_() for x in (h, w)]
        loss = linear_cross_entropy(*leaves, y, weights, None, scale, **choice)
        (loss * 0.7).backward()
        results.append([x.double() for x in (loss.detach(), *(x.grad for x in leaves))])
    for exact, torchs, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 1.2 * (torchs - exact).norm() + 2e-6 * exact.norm()


@needs_compiler
def test_the_compiled_softmax_of_large_logits_and_of_what_is_not_a_number():
    """Logits of 0 and 200: nothing overflows. A row with a NaN has a NaN for its loss, and no other row has."""
    weight = torch.eye(2).repeat(9, 1) * 200
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]], requires_grad=True)
    y, one = torch.tensor([0, 0, 0]), torch.ones(3)
    losses = [linear_cross_entropy(h[i : i + 1], weight, y[:1], one[:1], compiled=True) for i in range(3)]
    torch.testing.assert_close(losses[0].detach(), torch.tensor(9.0).log())
    torch.testing.assert_close(losses[1].detach(), 200 + torch.tensor(9.0).log())
    assert losses[2].isnan()


@needs_compiler
@pytest.mark.parametrize("target", [-100, -1, 53])
def test_a_target_outside_the_vocabulary_is_refused_before_anything_is_written(target):
    h, weight, y, weights, _ = inputs(dtype=torch.float32)
    y[-1] = target
    with pytest.raises(ValueError, match=r"targets must be in \[0, 53\)"):
        linear_cross_entropy(h, weight, y, weights, compiled=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_what_cannot_be_is_zero(dtype):
    """Probabilities of e^-69 and less have none, so that no product meets numbers too small for a float's usual form;
    those of e^-60 keep theirs."""
    z = torch.tensor([[0.0, -60.0, -100.0] + [-69.5] * 20]).to(dtype)
    compiled.cross_entropy(z, torch.tensor([0]), torch.ones(1), 1.0, slope=True)
    assert z[0, 1].item() == pytest.approx(math.exp(-60), rel=1e-2) and not z[0, 2:].any()


def test_chunks_of_a_large_vocabulary_are_not_of_a_few_rows():
    assert [chunk_rows(v, torch.device("cpu")) for v in (1000, 32_000, 151_936)] == [4194, 131, 128]
    assert chunk_rows(151_936, torch.device("cuda")) == 441


def test_by_hand():
    """Two classes, logits (0, ln 3): p = (1/4, 3/4); loss = 2 * -ln(1/4); dz = 2 * (1/4 - 1, 3/4)."""
    h = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]], dtype=torch.float64).log().clamp_min(0).requires_grad_()
    loss = linear_cross_entropy(h, weight, torch.tensor([0]), torch.tensor([2.0]))
    loss.backward()
    torch.testing.assert_close(loss, 2 * torch.tensor(4.0, dtype=torch.float64).log())
    torch.testing.assert_close(weight.grad, torch.tensor([[-1.5], [1.5]], dtype=torch.float64))


def test_no_labelled_rows_give_a_zero_with_zero_gradients():
    h, w, y, weights, _ = inputs(n=0)
    loss = linear_cross_entropy(h, w, y, weights)
    loss.backward()
    assert loss == 0 and h.grad.shape == (0, 16) and not w.grad.any()


def test_without_gradients_none_are_made():
    h, w, y, weights, _ = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(h, w, y, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*inputs()[:4]).detach())


def test_a_frozen_head_gets_no_gradient():
    h, w, y, weights, _ = inputs()
    w.requires_grad_(False)
    linear_cross_entropy(h, w, y, weights).backward()
    assert w.grad is None and h.grad.abs().sum() > 0


def test_bfloat16_stays_near_float32():
    h, w, y, weights, _ = inputs(n=64, v=200, h=64, dtype=torch.float32)
    exact = linear_cross_entropy(h, w, y, weights)
    rough = linear_cross_entropy(h.detach().bfloat16(), w.detach().bfloat16(), y, weights)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact.detach(), rtol=0.01, atol=0)
