"""The Triton kernels. Oracle: the torch form, which has its own tests against float64, on the same tensors.

On a CUDA device they run there. Elsewhere Triton's interpreter runs them on the CPU; it has to be switched on before
Triton is imported, so one test runs this file again in a process of its own. Whether they compile for a GPU (types,
shapes, registers) needs no GPU: Triton compiles ahead of time for any."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunery.kernels import backends, rms_norm, rotary, swiglu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
MODULES = (rms_norm, rotary, swiglu)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
runs_here = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs a CUDA device, or TRITON_INTERPRET=1")


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or CUDA, reason="the tests run right here")
def test_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What `run` gives through Triton and through torch."""
    results = []
    for triton in (True, False):
        for module in MODULES:
            monkeypatch.setattr(module, "runs_triton", lambda x, triton=triton: triton)
        results.append(run())
    return results


def compare(results: list[list[Tensor]], dtype: torch.dtype) -> None:
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        if dtype == torch.float32:
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        elif mine.numel():
            assert float((mine.float() - expected.float()).norm()) <= 2**-6 * float(expected.float().norm())


def noise(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda" if CUDA else "cpu", dtype).requires_grad_()


# Odd sizes, a single row, none at all, heads by themselves, and rows longer than one tile.
SHAPES = [(7, 33), (1, 64), (0, 16), (2, 3, 5, 8), (3, 1), (2, 4100)]


@needs_triton
@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_kernel(monkeypatch, shape, offset, cast_first, dtype):
    def run() -> list[Tensor]:
        x, residual, dy = (noise(*shape, dtype=dtype, seed=seed) for seed in range(3))
        weight = noise(shape[-1], dtype=dtype, seed=3)
        y = rms_norm.rms_norm(x, weight, 1e-5, offset, cast_first)
        single = torch.autograd.grad(y, (x, weight), dy)
        y2, h = rms_norm.add_rms_norm(x, residual, weight, 1e-5, offset, cast_first)
        return [y.detach(), *single, h.detach(), *torch.autograd.grad((y2, h), (x, residual, weight), (dy, dy * 2))]

    compare(both(monkeypatch, run), dtype)


@needs_triton
@runs_here
def test_rms_norm_kernel_with_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr("tunery.kernels.triton_rms_norm.PROGRAMS", 3)
    monkeypatch.setattr("tunery.kernels.triton_rms_norm.TILE", 32)

    def run() -> list[Tensor]:
        x, weight, dy = (noise(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(23, 12), (12,), (23, 12)]))
        return list(torch.autograd.grad(rms_norm.rms_norm(x, weight, 1e-5), (x, weight), dy))

    compare(both(monkeypatch, run), torch.float32)


@needs_triton
@runs_here
def test_rms_norm_kernel_promotes_as_the_library_does(monkeypatch):
    def run() -> list[Tensor]:
        x, weight = noise(5, 24, dtype=torch.bfloat16, seed=0), noise(24, dtype=torch.float32, seed=1)
        y = rms_norm.rms_norm(x, weight, 1e-5)
        assert y.dtype == torch.float32
        return [y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]

    compare(both(monkeypatch, run), torch.bfloat16)


@needs_triton
@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("depth", "width"), [(8, 8), (10, 6), (9, 2), (96, 48)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (1, 1), (1, 0)])
def test_rotary_kernel(monkeypatch, batch, tokens, depth, width, dtype):
    def run() -> list[Tensor]:
        q = noise(batch, tokens, 6, depth, dtype=dtype, seed=0).transpose(1, 2)
        k = noise(batch, 1, tokens, depth, dtype=dtype, seed=1)
        cos, sin = (noise(1, tokens, width, dtype=dtype, seed=s).detach().expand(batch, -1, -1) for s in (2, 3))
        turned = rotary.rotary(q, k, cos, sin)
        assert [t.stride() for t in turned] == [q.stride(), k.stride()]
        upstream = [noise(*t.shape, dtype=dtype, seed=4) for t in turned]
        return [*(t.detach() for t in turned), *torch.autograd.grad(turned, (q, k), upstream)]

    compare(both(monkeypatch, run), dtype)


@needs_triton
@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 33), (1, 64), (0, 16), (2, 3, 5), (2, 1500)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_kernel(monkeypatch, activation, shape, dtype):
    def run() -> list[Tensor]:
        both_halves = noise(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=0)
        gate, up = both_halves.chunk(2, dim=-1)
        y = swiglu.gated(gate, up, activation)
        dy = noise(*shape[::-1], dtype=dtype, seed=1).permute(*reversed(range(len(shape))))
        return [y.detach(), *torch.autograd.grad(y, (both_halves,), dy)]

    compare(both(monkeypatch, run), dtype)


@needs_triton
@runs_here
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_activation_again(monkeypatch, activation):
    """The backward's own gradient becomes the forward's result."""

    def run() -> list[Tensor]:
        gate, up, dy = (noise(4, 1500, dtype=torch.bfloat16, seed=seed).detach() for seed in range(3))
        gradients = swiglu.forms(gate, False)[1](dy, gate, up, activation, again=True)
        return [*gradients, dy]

    compare(both(monkeypatch, run), torch.bfloat16)


def test_float64_and_other_devices_keep_the_torch_form():
    assert not backends.runs_triton(torch.zeros(1))
    assert not backends.runs_triton(torch.zeros(1, dtype=torch.float64, device="meta"))


COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("triton_rms_norm._forward_kernel", {"CAST_FIRST": True, "ADD": True, "ROWS": 1, "BLOCK": 4096}),
    ("triton_rms_norm._forward_kernel", {"CAST_FIRST": False, "ADD": False, "ROWS": 32, "BLOCK": 128}),
    (
        "triton_rms_norm._backward_kernel",
        {"CAST_FIRST": True, "ADD": True, "WEIGHT": True, "ROWS": 1, "BLOCK": 4096},
    ),
    (
        "triton_rms_norm._backward_kernel",
        {"CAST_FIRST": False, "ADD": False, "WEIGHT": False, "ROWS": 32, "BLOCK": 128},
    ),
    ("triton_rotary._turn_kernel", {"BACK": False, "HEADS": 32, "BLOCK": 64, "REST": 0}),
    ("triton_rotary._turn_kernel", {"BACK": True, "HEADS": 8, "BLOCK": 32, "REST": 64}),
    ("triton_swiglu._forward_kernel", {"SILU": True, "BLOCK": 1024}),
    ("triton_swiglu._forward_kernel", {"SILU": False, "BLOCK": 1024}),
    *(
        ("triton_swiglu._backward_kernel", {"SILU": silu, "AGAIN": again, "BLOCK": 1024})
        for silu in (True, False)
        for again in (True, False)
    ),
]


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "ones", [(), ("n", "width", "half", "rest", "tokens", "x_depth", "y_depth", "x_stride", "residual_stride")]
)
@pytest.mark.parametrize(("name", "constants"), COMPILED)
def test_compiles_for_a_gpu(name, constants, ones):
    """For compute capability 8.0, in bfloat16, and without spilling registers; also with sizes of 1, which Triton
    turns into constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"tunery.kernels.{module}"), function)
    constants = constants | {size: 1 for size in ones if size in kernel.arg_names}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("rstd_ptr", "parts_ptr"):
            return "*fp32"
        return "*bf16" if argument.endswith("_ptr") else "fp32" if argument in ("eps", "offset") else "i32"

    source = ASTSource(kernel, {argument: kind(argument) for argument in kernel.arg_names}, constexprs=constants)
    compiled = triton_compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]
