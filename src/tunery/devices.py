"""What a run may run on: memory, arithmetic and bandwidth, of this machine's device or of one named."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from tunery.config import nearest
from tunery.data.cache import cache_folder
from tunery.engine import fast_bfloat16
from tunery.errors import ConfigError
from tunery.files import write_json
from tunery.flops import known_peak
from tunery.host import free_memory

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What can be reached, per second: floating-point operations in 16 bits (`low`) and in float32 (`wide`), bytes read
    and written. `launch`: seconds an operation takes before it does anything; `overlaps`: the device works while the
    next is launched."""

    low: float
    wide: float
    bytes: float
    launch: float
    overlaps: bool

    def seconds(self, low: bool, flops: int, moved: int) -> float:
        """Of one operation, its launch apart."""
        return max(flops / (self.low if low else self.wide), moved / self.bytes)


@dataclass(frozen=True)
class Device:
    """`kind` is "cuda" or "cpu"; `memory` what a process may use, in bytes; `overhead` what is gone before the first
    tensor; `slack` the share of the changing memory that an allocator loses between its blocks; `bfloat16` whether the
    hardware has it; `table` its rates, None where they are to be measured."""

    name: str
    kind: str
    memory: int
    overhead: int
    slack: float
    bfloat16: bool
    table: Rates | None = None

    @property
    def rates(self) -> Rates:
        """From the data sheet, or measured here."""
        return self.table or measured_rates(self.kind, self.name)


# name: (product, as flops.DENSE_BF16 knows it; usable memory in GiB; bandwidth in GB/s; float32 TFLOP/s outside the
# tensor cores; bfloat16 in hardware), from the makers' data sheets.
KNOWN: dict[str, tuple[str, float, float, float, bool]] = {
    "b200": ("B200", 178.0, 8000, 80.0, True),
    "h200": ("H200", 139.8, 4800, 67.0, True),
    "h100": ("H100", 79.1, 3350, 67.0, True),
    "h100-pcie": ("H100 PCIe", 79.1, 2000, 51.0, True),
    "h20": ("H20", 95.1, 4000, 44.0, True),
    "a100-80g": ("A100", 79.1, 2039, 19.5, True),
    "a100-40g": ("A100", 39.4, 1555, 19.5, True),
    "l40s": ("L40S", 44.4, 864, 91.6, True),
    "l4": ("L4", 22.0, 300, 30.3, True),
    "a40": ("A40", 44.4, 696, 37.4, True),
    "a10": ("A10", 22.0, 600, 31.2, True),
    "a6000": ("RTX A6000", 47.4, 768, 38.7, True),
    "6000-ada": ("RTX 6000 Ada", 47.4, 960, 91.1, True),
    "5090": ("RTX 5090", 31.4, 1792, 104.8, True),
    "4090": ("RTX 4090", 23.5, 1008, 82.6, True),
    "4080": ("RTX 4080", 15.6, 717, 48.7, True),
    "3090": ("RTX 3090", 23.6, 936, 35.6, True),
    "v100-32g": ("V100", 31.7, 900, 15.7, False),
    "t4": ("T4", 14.6, 320, 8.1, False),
}  # fmt: skip
# What large products and copies reach of the data sheet's figures, and Python's time for an operation.
MATMUL, COPY, LAUNCH = 0.75, 0.85, 8e-6
# A CUDA context with its libraries' workspaces; a CPU process with torch, transformers and PEFT loaded, the kernels
# compiled for its shapes, and the gaps in its heap (730 to 765 MB beside three jobs of bench.plan).
CUDA_OVERHEAD, CPU_OVERHEAD = int(0.9 * GIB), int(0.68 * GIB)
SLACK = 0.04


def known_device(name: str) -> Device:
    """A device by its short name, such as "h200"; "cpu" is this machine's. Raises ConfigError naming the nearest."""
    key = re.sub(r"[ _]+", "-", name.strip().lower())
    key = re.sub(r"^(nvidia-)?(geforce-)?(rtx-?)?", "", key)
    key = re.sub(r"(\d+)gb$", r"\1g", key)
    if key == "cpu":
        return this_device("cpu")
    if key not in KNOWN:
        names = [*KNOWN, "cpu"]
        raise ConfigError(f"--device {name}: not known{nearest(key, names)} (known: {', '.join(names)})")
    product, memory, bandwidth, wide, bfloat16 = KNOWN[key]
    peak = known_peak(product)
    assert peak is not None
    rates = Rates(MATMUL * peak, MATMUL * wide * 1e12, COPY * bandwidth * 1e9, LAUNCH, overlaps=True)
    return Device(key, "cuda", int(memory * GIB), CUDA_OVERHEAD, SLACK, bfloat16, rates)


def this_device(kind: str | None = None) -> Device:
    """The device a run would take here: CUDA where there is one."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        name, bfloat16 = torch.cuda.get_device_name(), fast_bfloat16(torch.device(kind))
        ours = total - free < CUDA_OVERHEAD  # nobody else is on it
        memory = total if ours else free
        return Device(name, kind, memory, CUDA_OVERHEAD, SLACK, bfloat16)
    name = f"{_processor()}, {torch.get_num_threads()} threads"
    bfloat16 = fast_bfloat16(torch.device("cpu"))
    return Device(name, kind, free_memory() or _installed_memory(), CPU_OVERHEAD, SLACK, bfloat16)


def _processor() -> str:
    """The processor's name, for people and for the name of what was measured on it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------ a second of measuring


@cache
def measured_rates(kind: str, name: str) -> Rates:
    """Of this machine's device: measured once, in two seconds, and kept in the cache folder by device and torch
    version."""
    key = re.sub(r"[^\w.+-]+", "_", f"{name}-torch{torch.__version__}")
    path = cache_folder() / "rates" / f"{key}.json"
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    rates = _measure(torch.device(kind))
    with suppress(OSError):  # a cache that cannot be written costs a second the next time
        write_json(path, asdict(rates))
    return rates


def _measure(device: torch.device) -> Rates:
    """The best of a few repetitions: a plan is for a machine with nothing else to do."""
    large = device.type == "cuda"
    side = 4096 if large else 512

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / _best(lambda: a @ a, device)

    values = torch.randn((64 if large else 4) * 2**20, device=device)  # 16 MB on a CPU, a usual activation there
    moved = 2 * values.numel() * values.element_size() / _best(lambda: values * 2.0, device)
    one = torch.ones(1, device=device, requires_grad=True)
    launch = _best(lambda: [one * one for _ in range(100)], device) / 100
    return Rates(product(torch.bfloat16), product(torch.float32), moved, launch, overlaps=large)


def _best(work: Callable[[], object], device: torch.device, budget: float = 0.4) -> float:
    """Seconds of one call."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()  # the first call also loads and chooses a kernel
    best, end = math.inf, time.perf_counter() + budget
    while time.perf_counter() < end:
        best = min(best, timed())
    return best
