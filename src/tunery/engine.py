"""Device, precision, ranks: the only importer of accelerate.

Gradients are summed over ranks here, once a step, after the last micro-batch, whatever the number of micro-batches on
each rank; so a step is the same on one rank or on many. (Accelerate's own backward would divide by its accumulation
steps, and DistributedDataParallel average over ranks and insist on the same number of forwards everywhere.)"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tunery.errors import ConfigError, TuneryError
from tunery.host import keep_few_products

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls run in hardware there. A probe of features, not of time, so that a resumed run decides
    the same."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))
    return False


def check_dtype(name: str) -> None:
    """Raises ConfigError for a dtype that cannot be trained in."""
    if name == "float16":
        raise ConfigError(
            "model.dtype: float16 overflows without loss scaling and is emulated on a CPU; "
            "use bfloat16 or float32 (auto chooses)"
        )


class Numbers:
    """A few numbers on their way from the device. The copy is queued behind what computes them and nobody waits for
    it until `read`, which waits for this copy alone and not for what was queued later."""

    def __init__(self, values: Tensor):
        self._values = values.detach().to("cpu", torch.float64, non_blocking=True)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class Engine:
    """`rank` of `world` processes (started by torchrun or alone), each with a `device`, computing in `dtype`. `lag`:
    steps that may be queued on the device before their numbers are read; 0 on a CPU, which computes at once."""

    def __init__(self, dtype: str = "auto"):
        from accelerate import PartialState

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        keep_few_products()
        state = PartialState(cpu=not torch.cuda.is_available())
        self.device = torch.device(state.device or "cpu")
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.is_main = self.rank == 0
        self.dtype = self._dtype(dtype)
        self.lag = 1 if self.device.type == "cuda" else 0
        if self.world > 1 and not dist.is_initialized():
            raise TuneryError("an earlier run of this process failed and left the other ranks; start all of them anew")
        # Numbers that are on the host anyway are exchanged there: through NCCL they would wait for the device.
        apart = self.world > 1 and dist.get_backend() != "gloo"
        self._hosts: Any = dist.new_group(backend="gloo") if apart else None
        if self.world > 1:
            atexit.unregister(self.leave)  # of an earlier run
            atexit.register(self.leave)

    def _dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            return torch.bfloat16 if fast_bfloat16(self.device) else torch.float32
        check_dtype(name)
        return DTYPES[name]

    # ------------------------------------------------------------------ ranks

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks of numbers that the host knows. No device is asked or waited for."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self._hosts)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers, by way of the hosts as well."""
        found = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._hosts)
        return int(found)

    def sum_on_device(self, values: Tensor) -> None:
        """Sum a small tensor of the device's over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)

    def sum_metrics(self, metrics: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """name -> (sum, weight), summed over ranks in their order. A rank may lack a name."""
        if self.world == 1:
            return metrics
        everyone = self.gather(metrics)
        names = sorted({name for one in everyone for name in one})
        pairs = {name: [one.get(name, (0.0, 0.0)) for one in everyone] for name in names}
        return {name: (sum(p[0] for p in many), sum(p[1] for p in many)) for name, many in pairs.items()}

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self._hosts)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self._hosts)

    def same_weights(self, parameters: Iterable[Tensor]) -> None:
        """Give every rank rank 0's parameters (a random initialisation is seeded alike, but be sure)."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Sum the gradients over ranks, in one flat buffer per dtype. A rank without rows gives zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1:
            return
        for dtype in sorted({p.dtype for p in parameters}, key=str):
            grads = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat)
            for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(piece.view_as(grad))

    # ------------------------------------------------------------------ randomness, memory

    def seed(self, seed: int, step: int, rank: int | None = None) -> None:
        """Everything random in a step (dropout, noise) is a function of (seed, step, rank), so a resumed run needs no
        saved generator to go on exactly. `rank` is this one's unless given (a replay plays them all)."""
        value = int(
            np.random.SeedSequence([seed, step, self.rank if rank is None else rank]).generate_state(1, np.uint64)[0]
            >> np.uint64(1)
        )
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)

    def memory(self) -> int:
        """Peak bytes in use: of the device, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @staticmethod
    def leave() -> None:
        """Leave the process group, if torchrun made one: at the end of the process, whose runs all use the same one, or
        when this rank has failed. Never waits for the others."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
