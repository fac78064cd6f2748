"""The kernels of this folder's C++ files, built by this machine's compiler: attention tile by tile (attention.cpp), and
the head's softmax (head.cpp), the norm, rotary embedding and gated activations (elementwise.cpp) in one pass over
memory, where torch's operations take three to a hundred, each waking and waiting for every thread.

Building takes a few seconds and happens once a machine (the library is kept in the cache folder, under a name that
says source, flags and processor); loading takes milliseconds. Unlike torch.compile there is nothing to trace or to
compile again when a length changes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tunery.errors import TuneryError
from tunery.files import cache_folder
from tunery.kernels.backends import as_rows

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.cpp", "elementwise.cpp", "head.cpp"))
HEADER = Path(__file__).with_name("numbers.h")
# No flag that assumes numbers to be finite: what is not must come out as it went in.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math"),  # without these the loops are not vectorised
)

_LETTERS = {torch.bfloat16: "b", torch.float32: "f"}
# Arguments of each function: p a tensor or None, i an integer, f a float; the number of threads comes last.
_ARGUMENTS = {
    "rms_forward": "ppppppiiiifi",
    "rms_backward": "pppppppiiiiii",
    "turn": "ppppiiiiiiiiiiiii",
    "silu_forward": "pppiiii",
    "silu_backward": "pppppiiiiii",
    "gelu_tanh_forward": "pppiiii",
    "gelu_tanh_backward": "pppppiiiiii",
    "cross_entropy": "pppppiifii",
    "attention_forward": "pppppppiiiiiiiiiiiifi",
    "attention_backward": "pppppppppppiiiiiiiiiiiiiiifi",
}
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


def available() -> bool:
    """Whether the kernels can be had here, without building them: Linux, and a C++ compiler ($CXX, g++ or clang++)."""
    return sys.platform == "linux" and compiler() is not None


def compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@cache
def library() -> ctypes.CDLL:
    """The built kernels, from the cache folder where they are there. Raises TuneryError when they cannot be built."""
    program = compiler()
    if not available() or program is None:
        raise TuneryError("compiled kernels need Linux and a C++ compiler (g++ or clang++, or $CXX): none was found")
    name = hashlib.sha256(
        repr(([file.read_bytes() for file in (*SOURCES, HEADER)], FLAGS, program, _processor())).encode()
    ).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    with suppress(OSError):  # a home that cannot be written, or nothing in it may be run
        folder.mkdir(parents=True, exist_ok=True)
        return _loaded(program, folder / f"kernels-{name}.so")
    try:
        with tempfile.TemporaryDirectory(prefix="tunery-") as private:  # what is loaded stays when its file goes
            return _loaded(program, Path(private) / "kernels.so")
    except OSError as error:
        raise TuneryError(f"the compiled kernels cannot be built or loaded here: {error}") from error


@cache
def ready() -> bool:
    """Whether the kernels are there to be used: found, or built just now. Where they cannot be, torch's operations do
    the same."""
    try:
        library()
    except TuneryError:
        return False
    return True


def _loaded(program: str, path: Path) -> ctypes.CDLL:
    """The library at `path`, built first where it is missing, or is there and broken."""
    if path.exists():
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    _build(program, path)
    return ctypes.CDLL(str(path))


def rms_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual or x itself, rstd [..., 1] float32)."""
    rows, other = as_rows(x), None if residual is None else as_rows(residual)
    n, width = rows.shape
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype)
    h = x if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    strides = (rows.stride(0), 0 if other is None else other.stride(0))
    scale = _scale(weight, offset)
    _call("rms_forward", (x, y), rows, other, h, scale, y, rstd, n, width, *strides, eps, cast_first)
    return y, h, rstd


def rms_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    cast_first: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(d loss / d h with `dh`, what comes to h from elsewhere, added; d loss / d weight or None)."""
    rows, up, more = as_rows(h), as_rows(dy), None if dh is None else as_rows(dh)
    n, width = rows.shape
    dx = torch.empty(h.shape, dtype=h.dtype)
    parts = torch.zeros((torch.get_num_threads(), width)) if need_weight else None
    strides = (up.stride(0), 0 if more is None else more.stride(0), rows.stride(0))
    scale = _scale(weight, offset)
    _call("rms_backward", (h, dy), up, more, rows, scale, rstd, dx, parts, n, width, *strides, cast_first)
    return dx, None if parts is None else parts.sum(0).to(weight.dtype)


def turn(x: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, back: bool) -> Tensor:
    """x [B, heads, T, D] turned by the angles, or by the transposed rotation (`back`)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos_BTR.contiguous(), sin_BTR.to(cos_BTR.dtype).contiguous()
    y = torch.empty_like(x)
    batch, heads, tokens, depth = x.shape
    half = cos.shape[-1] // 2
    sizes = (batch, heads, tokens, half, depth - 2 * half)
    strides = (*x.stride()[:3], *y.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0)
    _call("turn", (x, cos), x, cos, sin, y, *sizes, *strides, back)
    return y


def gated_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype)
    g, u = as_rows(gate), as_rows(up)
    _call(f"{activation}_forward", (gate,), g, u, y, *g.shape, g.stride(0), u.stride(0))
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> tuple[Tensor, Tensor]:
    """(d loss / d gate, d loss / d up). Where `again`, dy, which must have adjacent columns, becomes activation(gate) *
    up."""
    dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
    d, g, u = as_rows(dy), as_rows(gate), as_rows(up)
    strides = (d.stride(0), g.stride(0), u.stride(0))
    _call(f"{activation}_backward", (gate,), d, g, u, dgate, dup, *g.shape, *strides, again)
    return dgate, dup


def cross_entropy(z: Tensor, targets: Tensor, weights: Tensor, scale: float, slope: bool) -> Tensor:
    """weights * -log softmax(scale * z)[targets] of each row of z [N, V], float32 [N]. Where `slope`, z becomes the
    gradient of their sum; it must be contiguous. Raises ValueError for a target outside the vocabulary."""
    losses, outside = torch.empty(z.shape[0]), ctypes.c_int64(0)
    targets, weights = targets.contiguous(), weights.float().contiguous()
    _call("cross_entropy", (z,), z, targets, weights, losses, ctypes.addressof(outside), *z.shape, scale, slope)
    if outside.value:
        raise ValueError(f"targets must be in [0, {z.shape[1]}), not {targets.min()} to {targets.max()}")
    return losses


def takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether attention.cpp has a form for these [heads, T, D]: of one dtype, which this processor multiplies, and of
    whole vectors. Shapes that do not belong together are left to torch's operations, which refuse them."""
    if query.shape[-1] != key.shape[-1] or key.shape[:2] != value.shape[:2] or query.shape[0] % key.shape[0]:
        return False
    if not (query.dtype == key.dtype == value.dtype) or not _address("attention_forward", _LETTERS[query.dtype]):
        return False
    fits = all(x.shape[-1] % 16 == 0 and 0 < x.shape[-1] <= 256 for x in (query, value))
    return fits and all(x.stride(-1) == 1 and x.stride(0) % 2 == x.stride(1) % 2 == 0 for x in (query, key, value))


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(softmax(scale * q k^T) v [T, heads, Dv], the logarithms of the softmax's sums [heads, T] float32). `bounds` of
    the sequences, int64 [R + 1], and those of their keys, of which the queries are the last."""
    (heads, tokens, dim), (kv, _, width) = query.shape, value.shape
    out = torch.empty(tokens, heads, width, dtype=query.dtype)
    lse = torch.empty(heads, tokens)
    sizes = (len(bounds) - 1, heads, kv, dim, width)
    _call(
        "attention_forward", (query,), query, key, value, out, lse, bounds, key_bounds, *sizes,
        *_strides(query, key, value), window or 0, scale,
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, in memory [T, heads, D]. dout and out [T, heads, Dv]."""
    (heads, tokens, dim), (kv, _, width) = query.shape, value.shape
    segments = len(bounds) - 1
    # Sums over the queries of a group are made one after the other where that leaves work for every thread.
    splits = 1 if segments * kv >= 2 * torch.get_num_threads() else heads // kv
    dquery = torch.empty(tokens, heads, dim, dtype=query.dtype).transpose(0, 1)
    dkey, dvalue = (torch.zeros(splits, key.shape[1], kv, n) for n in (dim, width))
    strides = (*_strides(query, key, value, dquery), splits, window or 0)
    sizes = (segments, heads, kv, dim, width)
    _call(
        "attention_backward", (query,), query, key, value, out, dout.contiguous(), lse, dquery, dkey, dvalue, bounds,
        key_bounds, *sizes, *strides, scale,
    )  # fmt: skip
    dkey, dvalue = (x[0] if splits == 1 else x.sum(0) for x in (dkey, dvalue))
    return dquery, dkey.to(key.dtype).transpose(0, 1), dvalue.to(value.dtype).transpose(0, 1)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of heads and of tokens, in [heads, T, D]."""
    return tuple(x.stride(axis) for x in tensors for axis in (0, 1))


def _call(name: str, types: tuple[Tensor, ...], *arguments: Tensor | float | None) -> None:
    """Tensors are passed by address, so they stay alive in the caller's `arguments` until the call is over."""
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _function(name, "".join(_LETTERS[t.dtype] for t in types))(*plain, torch.get_num_threads())


@cache
def _function(name: str, letters: str) -> Callable[..., None]:
    prototype = ctypes.CFUNCTYPE(None, *(_C_TYPES[a] for a in _ARGUMENTS[name]))
    return prototype(_address(name, letters))


@cache
def _address(name: str, letters: str) -> int:
    """0 where this processor has no such form."""
    return ctypes.c_size_t.in_dll(library(), f"{name}_{letters}").value


def _scale(weight: Tensor, offset: float) -> Tensor:
    return weight.float().add(offset).contiguous() if offset else weight.float().contiguous()


def _processor() -> str:
    """What -march=native depends on: machines that share a home need not be alike."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return platform.processor() or platform.machine()


def _build(program: str, path: Path) -> None:
    """Beside its place, then renamed into it: several processes may build at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [program, *FLAGS, *map(str, SOURCES), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise TuneryError(f"the kernels could not be compiled: {' '.join(command)}\n{done.stderr.strip()}")
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)
