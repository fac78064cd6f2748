"""The kernels compiled for a CPU. Oracle: the torch form, which has its own tests, on the same tensors; in bfloat16 the
formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunery.errors import TuneryError
from tunery.kernels import compiled, rms_norm, rotary, swiglu

needs_compiler = pytest.mark.skipif(not compiled.available(), reason="needs Linux and a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


def noise(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def compare(run: Callable[[bool], list[Tensor]], dtype: torch.dtype) -> None:
    """`run` with the compiled form and with torch's."""
    for mine, expected in zip(run(True), run(False), strict=True):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        if dtype == torch.float32:
            torch.testing.assert_close(mine, expected, rtol=2e-6, atol=2e-6)
        elif mine.numel():
            assert float((mine.float() - expected.float()).norm()) <= 2**-7 * float(expected.float().norm())


# Odd sizes, a single row, none at all, heads by themselves, and enough for several threads.
SHAPES = [(7, 33), (1, 64), (0, 16), (2, 3, 5, 8), (3, 1), (9, 4100)]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, offset, cast_first, dtype):
    def run(compiled: bool) -> list[Tensor]:
        x, residual, dy = (noise(*shape, dtype=dtype, seed=seed) for seed in range(3))
        weight = noise(shape[-1], dtype=dtype, seed=3)
        y = rms_norm.rms_norm(x, weight, 1e-5, offset, cast_first, compiled)
        single = torch.autograd.grad(y, (x, weight), dy)
        y2, h = rms_norm.add_rms_norm(x, residual, weight, 1e-5, offset, cast_first, compiled)
        both = torch.autograd.grad((y2, h), (x, residual, weight), (dy, dy * 2))
        return [t.detach() for t in (y, *single, y2, h, *both)]

    compare(run, dtype)


@needs_compiler
def test_rms_norm_of_slices_and_of_mixed_dtypes():
    def run(compiled: bool) -> list[Tensor]:
        wide, weight = noise(5, 3, 48, dtype=torch.bfloat16, seed=0), noise(24, dtype=torch.float32, seed=1)
        residual = noise(5, 3, 24, dtype=torch.float32, seed=2)
        y = rms_norm.rms_norm(wide[..., 24:], weight, 1e-5, compiled=compiled)
        assert y.dtype == torch.float32
        y2, h = rms_norm.add_rms_norm(wide[..., :24], residual, weight, 1e-5, compiled=compiled)
        dy = noise(24, 3, 5, dtype=torch.float32, seed=3).permute(2, 1, 0)
        grads = torch.autograd.grad((y, y2, h), (wide, weight, residual), (dy, dy, dy))
        return [t.detach() for t in (y, y2, h, *grads)]

    compare(run, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", DTYPES)
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (10, 6), (9, 2), (96, 48)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (1, 0), (1, 300)])
def test_rotary(batch, tokens, depth, width, angles, dtype):
    def run(compiled: bool) -> list[Tensor]:
        q = noise(batch, tokens, 6, depth, dtype=dtype, seed=0).transpose(1, 2)
        k = noise(batch, depth, 1, tokens, dtype=dtype, seed=1).permute(0, 2, 3, 1)
        cos, sin = (noise(1, tokens, width, dtype=angles, seed=s).detach().expand(batch, -1, -1) for s in (2, 3))
        turned = rotary.rotary(q, k, cos, sin, compiled)
        assert turned[0].stride() == q.stride()
        upstream = [noise(*t.shape, dtype=dtype, seed=4) for t in turned]
        return [t.detach() for t in (*turned, *torch.autograd.grad(turned, (q, k), upstream))]

    compare(run, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (1, 64), (0, 16), (2, 3, 5), (20, 1500)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation, shape, dtype):
    def run(compiled: bool) -> list[Tensor]:
        both = noise(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=0)
        y = swiglu.gated(*both.chunk(2, dim=-1), activation, compiled)
        dy = noise(*shape[::-1], dtype=dtype, seed=1).permute(*reversed(range(len(shape))))
        return [y.detach(), *torch.autograd.grad(y, both, dy)]

    compare(run, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_activation_again(activation, dtype):
    """Over the backward's own gradient, exactly what the forward gave, and the same gradients."""
    gate, up, dy = (noise(20, 1500, dtype=dtype, seed=seed).detach() for seed in range(3))
    for is_compiled in (True, False):
        forward, backward = swiglu.forms(gate, is_compiled)
        over = dy.clone()
        again, apart = (backward(over if a else dy, gate, up, activation, again=a) for a in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(again, apart, strict=True))
        assert torch.equal(over, forward(gate, up, activation))


@needs_compiler
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_exponential_over_its_whole_range(activation):
    """Against float64, relative to the size of the result."""
    gate = torch.linspace(-120, 120, 100_001).requires_grad_()
    y = swiglu.gated(gate, torch.ones_like(gate), activation, compiled=True)
    exact_gate = gate.detach().double().requires_grad_()
    exact = swiglu.reference(exact_gate, torch.ones_like(exact_gate), activation)
    scale = 1e-4 + exact.detach().abs()
    assert ((y.double() - exact) / scale).abs().max() < 2e-6
    slope, exact_slope = torch.autograd.grad(y.sum(), gate)[0], torch.autograd.grad(exact.sum(), exact_gate)[0]
    assert (slope - exact_slope).abs().max() < 1e-6


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so(dtype):
    bad = torch.tensor([[1.0, float("nan"), 2.0], [1.0, float("inf"), 3.0]], dtype=dtype)
    one = torch.ones_like(bad)
    assert swiglu.gated(bad, one, compiled=True).isnan().tolist() == [[False, True, False], [False, False, False]]
    assert swiglu.gated(bad, one, compiled=True)[1, 1] == float("inf")
    assert rms_norm.rms_norm(bad, one[0], 1e-5, compiled=True)[0].isnan().all()


@needs_compiler
def test_the_same_bits_every_time():
    x, weight, dy = (noise(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(999, 65), (65,), (999, 65)]))
    grads = [torch.autograd.grad(rms_norm.rms_norm(x, weight, 1e-5, compiled=True), weight, dy)[0] for _ in range(5)]
    assert all(torch.equal(grads[0], grad) for grad in grads)


@needs_compiler
def test_float64_keeps_the_torch_form():
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(swiglu.gated(x, x, compiled=True), swiglu.gated(x, x))


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    assert not compiled.available()
    with pytest.raises(TuneryError, match=r"C\+\+ compiler"):
        compiled.library.__wrapped__()


@needs_compiler
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "FLAGS", ("--no-such-flag",))
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    with pytest.raises(TuneryError, match=r"could not be compiled: .*no-such-flag"):
        compiled.library.__wrapped__()
    assert not list((tmp_path / "kernels").iterdir())


def test_a_compiler_that_complains_in_another_encoding(monkeypatch, tmp_path):
    program = tmp_path / "c++"
    program.write_bytes(b"#!/bin/sh\nprintf 'f\\374r nichts' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(TuneryError, match="could not be compiled"):
        compiled._build(str(program), tmp_path / "kernels.so")


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """Kernels that are compiled at once, for what is done with them whatever they are."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" { int silu_forward_b = 1; }\n')
    monkeypatch.setattr(compiled, "SOURCES", (source,))
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


@needs_compiler
def test_a_cache_that_cannot_be_written(small_source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "file"))
    assert compiled.library().silu_forward_b


@needs_compiler
def test_a_broken_library_is_built_again_and_an_unloadable_one_is_an_error_of_ours(small_source, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "one"))
    compiled.library()
    (built,) = (tmp_path / "one" / "kernels").glob("*.so")
    broken = tmp_path / "other" / "kernels" / built.name
    broken.parent.mkdir(parents=True)
    broken.touch()
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "other"))
    compiled.library.cache_clear()
    compiled.library()
    assert broken.stat().st_size > 0

    nothing = tmp_path / "nothing"
    nothing.write_text("#!/bin/sh\nexit 0\n")
    nothing.chmod(0o755)
    monkeypatch.setenv("CXX", str(nothing))
    compiled.library.cache_clear()
    with pytest.raises(TuneryError, match="cannot be built or loaded"):
        compiled.library()
