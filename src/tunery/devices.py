"""What a run may run on: memory, arithmetic and bandwidth, of this machine's device or of one named."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from time import perf_counter, thread_time

import torch
from torch import Tensor, nn

from tunery.data.cache import cache_folder
from tunery.engine import fast_bfloat16
from tunery.errors import ConfigError
from tunery.files import write_json
from tunery.flops import known_peak
from tunery.host import free_memory, keep_few_products
from tunery.kernels.lora import Projection, lora_linear
from tunery.kernels.rms_norm import rms_norm
from tunery.memory import Ledger

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What can be reached, per second: floating-point operations in 16 bits (`low`) and in float32 (`wide`), bytes read
    and written, and bytes copied to or from the `host`, each way (on a CPU, whose memory that is, as any). `launch`:
    seconds an operation takes before it does anything, the Python around it included; `fresh`: seconds more that a
    product in 16 bits takes the first time its shapes come, as they do with every stream of another length;
    `overlaps`: the device works while the next operation is launched."""

    low: float
    wide: float
    bytes: float
    host: float
    launch: float
    fresh: float
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
# tensor cores; bfloat16 in hardware; generation of its PCIe, of 16 lanes), from the makers' data sheets.
KNOWN: dict[str, tuple[str, float, float, float, bool, int]] = {
    "b200": ("B200", 178.0, 8000, 80.0, True, 5),
    "h200": ("H200", 139.8, 4800, 67.0, True, 5),
    "h100": ("H100", 79.1, 3350, 67.0, True, 5),
    "h100-pcie": ("H100 PCIe", 79.1, 2000, 51.0, True, 5),
    "h100-nvl": ("H100 NVL", 93.1, 3900, 60.0, True, 5),
    "h800": ("H800", 79.1, 3350, 67.0, True, 5),
    "h20": ("H20", 95.1, 4000, 44.0, True, 5),
    "a100-80g": ("A100", 79.1, 2039, 19.5, True, 4),
    "a100-40g": ("A100", 39.4, 1555, 19.5, True, 4),
    "a800-80g": ("A800", 79.1, 2039, 19.5, True, 4),
    "l40s": ("L40S", 44.4, 864, 91.6, True, 4),
    "l40": ("L40", 44.4, 864, 90.5, True, 4),
    "l4": ("L4", 22.0, 300, 30.3, True, 4),
    "a40": ("A40", 44.4, 696, 37.4, True, 4),
    "a30": ("A30", 23.5, 933, 10.3, True, 4),
    "a10": ("A10", 22.0, 600, 31.2, True, 4),
    "a10g": ("A10G", 22.0, 600, 31.2, True, 4),
    "a6000": ("RTX A6000", 47.4, 768, 38.7, True, 4),
    "6000-ada": ("RTX 6000 Ada", 47.4, 960, 91.1, True, 4),
    "5090": ("RTX 5090", 31.4, 1792, 104.8, True, 5),
    "5080": ("RTX 5080", 15.5, 960, 56.3, True, 5),
    "4090": ("RTX 4090", 23.5, 1008, 82.6, True, 4),
    "4080": ("RTX 4080", 15.6, 717, 48.7, True, 4),
    "3090": ("RTX 3090", 23.6, 936, 35.6, True, 4),
    "3080": ("RTX 3080", 9.7, 760, 29.8, True, 4),
    "3060": ("RTX 3060", 11.6, 360, 12.7, True, 4),
    "2080-ti": ("RTX 2080 Ti", 10.7, 616, 13.4, False, 3),
    "v100-32g": ("V100", 31.7, 900, 15.7, False, 3),
    "v100-16g": ("V100", 15.7, 900, 15.7, False, 3),
    "p100": ("P100", 15.9, 732, 9.3, False, 3),
    "t4": ("T4", 14.6, 320, 8.1, False, 3),
}  # fmt: skip
# What large products and copies reach of the data sheet's figures, and Python's time for an operation.
MATMUL, COPY, LAUNCH = 0.75, 0.85, 8e-6
# A real step's operations take so many times what a few do again and again, whose code is at hand: 2.0 and 2.2 beside
# tiny models in float32, LoRA and full, on one thread.
COLD = 2.0
# Bytes a second that copies to or from pinned memory of the host reach over 16 lanes of a generation of PCIe, one way.
PCIE = {3: 12.5e9, 4: 25e9, 5: 50e9}
# A CUDA context with its libraries' workspaces; a CPU process with torch, transformers and PEFT loaded, the kernels
# compiled for its shapes, and the gaps in its heap (730 to 765 MB beside three jobs of bench.plan).
CUDA_OVERHEAD, CPU_OVERHEAD = int(0.9 * GIB), int(0.68 * GIB)
SLACK = 0.04


def known_device(name: str) -> Device:
    """A device by its short name, such as "h200"; "cpu", "cuda" and "cuda:1" are this machine's. Raises ConfigError,
    naming the nearest, for one that is not known and for a CUDA device that is not here."""
    key = re.sub(r"[ _]+", "-", name.strip().lower())
    if not key:
        raise ConfigError(f"--device: is empty; leave it out for this machine, or give one of {', '.join(_names())}")
    if re.fullmatch(r"cpu|cuda(:\d+)?", key):
        return this_device(key)
    key = re.sub(r"^(nvidia-)?(tesla-|geforce-|quadro-)?(rtx-?)?", "", key)
    key = re.sub(r"(\d+)gb$", r"\1g", re.sub(r"-sxm\d?|-pcie(?=-)", "", key))
    key = re.sub(r"(?<=\d)ti$", "-ti", key)
    if key not in KNOWN:
        raise ConfigError(f"--device {name}: not known{_near(key)} (known: {', '.join(_names())})")
    product, memory, bandwidth, wide, bfloat16, generation = KNOWN[key]
    peak = known_peak(product)
    assert peak is not None
    rates = Rates(
        MATMUL * peak, MATMUL * wide * 1e12, COPY * bandwidth * 1e9, PCIE[generation], LAUNCH, fresh=0.0, overlaps=True
    )
    return Device(key, "cuda", int(memory * GIB), CUDA_OVERHEAD, SLACK, bfloat16, rates)


def _names() -> list[str]:
    return [*KNOWN, "cpu", "cuda"]


def _near(key: str) -> str:
    """`; did you mean 'a100-80g' or 'a100-40g'?`: those that begin so, or else up to three that look alike."""
    near = [name for name in KNOWN if name.startswith(f"{key}-")] or get_close_matches(key, _names(), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def this_device(name: str | None = None) -> Device:
    """The device a run would take here, CUDA where there is one; or "cpu", "cuda" or "cuda:1". Raises ConfigError for a
    CUDA device that is not here."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        _check_cuda(device)
        free, total = torch.cuda.mem_get_info(device)
        ours = total - free < CUDA_OVERHEAD  # nobody else is on it
        memory = total if ours else free
        return Device(
            torch.cuda.get_device_name(device), "cuda", memory, CUDA_OVERHEAD, SLACK, fast_bfloat16(device)
        )  # fmt: skip
    processor = f"{_processor()}, {torch.get_num_threads()} threads"
    memory = free_memory() or _installed_memory()
    return Device(processor, "cpu", memory, CPU_OVERHEAD, SLACK, fast_bfloat16(device))


def _check_cuda(device: torch.device) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ConfigError(f"--device {device}: there is no CUDA device here; name one of {', '.join(KNOWN)}, or cpu")
    if device.index is not None and device.index >= count:
        raise ConfigError(f"--device {device}: there are {count} CUDA devices here, numbered from 0")


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
    keep_few_products()  # some of what is timed has ever other shapes
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
    return Rates(
        product(torch.bfloat16), product(torch.float32), moved, _host_rate(values) if large else moved,
        _launch(device), _fresh(device), overlaps=large,
    )  # fmt: skip


def _host_rate(values: Tensor) -> float:
    """Bytes a second from the device to pinned memory of the host."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return values.numel() * values.element_size() / _best(lambda: host.copy_(values, non_blocking=True), values.device)


def _launch(device: torch.device) -> float:
    """Seconds of an operation with nothing to compute, in a forward and backward of small layers as a run has them:
    what Python, autograd and the dispatch take, shared among the operations that a plan counts. By the thread's own
    clock, so that a machine with other things to do says nearly the same."""
    x, weight = torch.ones(8, 16, device=device), torch.ones(16, device=device)
    square = torch.ones(16, 16, device=device)
    low = [torch.ones(shape, device=device, requires_grad=True) for shape in ((4, 16), (16, 4))]

    def step() -> None:
        h = x
        for _ in range(8):
            (gate,) = lora_linear(rms_norm(h, weight, 1e-6), [Projection(square, None, low[0], low[1], 1.0)])
            (out,) = lora_linear(nn.functional.silu(gate) * gate, [Projection(square, None, low[0], low[1], 1.0)])
            h = h + out
        h.sum().backward()

    ledger = Ledger()
    with ledger:
        step()
    return COLD * _best(step, device, clock=thread_time) / sum(ledger.spans[0].work.values())


def _fresh(device: torch.device) -> float:
    """Seconds that small products in bfloat16 take longer when each has other shapes."""
    b = torch.ones(16, 24, dtype=torch.bfloat16, device=device)
    rows = itertools.cycle(torch.ones(4 + n, 16, dtype=torch.bfloat16, device=device) for n in range(2000))
    same = torch.ones(8, 16, dtype=torch.bfloat16, device=device)
    again = _best(lambda: [same @ b for _ in range(20)], device, 0.1, thread_time)
    return max(0.0, _best(lambda: [next(rows) @ b for _ in range(20)], device, 0.3, thread_time) - again) / 20


def _best(
    work: Callable[[], object], device: torch.device, budget: float = 0.4, clock: Callable[[], float] = perf_counter
) -> float:
    """Seconds of one call, by `clock`."""

    def timed() -> float:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    timed()  # the first call also loads and chooses a kernel
    best, end = math.inf, perf_counter() + budget
    while perf_counter() < end:
        best = min(best, timed())
    return best
