"""Device, precision, ranks: the only importer of accelerate.

Gradients are summed over ranks here, once a step, after the last micro-batch, whatever the number of micro-batches on
each rank; so a step is the same on one rank or on many. (Accelerate's own backward would divide by its accumulation
steps, and DistributedDataParallel average over ranks and insist on the same number of forwards everywhere.)"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tunery.errors import ConfigError

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


class Engine:
    """`rank` of `world` processes (started by torchrun or alone), each with a `device`, computing in `dtype`."""

    def __init__(self, dtype: str = "auto"):
        from accelerate import PartialState

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        state = PartialState(cpu=not torch.cuda.is_available())
        self.device = torch.device(state.device or "cpu")
        self.rank: int = state.process_index
        self.world: int = state.num_processes
        self.is_main = self.rank == 0
        self.dtype = self._dtype(dtype)

    def _dtype(self, name: str) -> torch.dtype:
        if name == "auto":
            return torch.bfloat16 if fast_bfloat16(self.device) else torch.float32
        check_dtype(name)
        return DTYPES[name]

    # ------------------------------------------------------------------ ranks

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small tensor on any device, in float64; comes back on the CPU."""
        total = values.detach().to(torch.float64)
        if self.world > 1:
            total = total.to(self.device) if dist.get_backend() == "nccl" else total.cpu()
            dist.all_reduce(total)
        return total.cpu()

    def sum_metrics(self, metrics: dict[str, tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
        """name -> (sum, weight), summed over ranks in their order, as plain numbers. A rank may lack a name."""
        mine = {name: (float(value), float(weight)) for name, (value, weight) in metrics.items()}
        if self.world == 1:
            return mine
        everyone = self.gather(mine)
        names = sorted({name for one in everyone for name in one})
        pairs = {name: [one.get(name, (0.0, 0.0)) for one in everyone] for name in names}
        return {name: (sum(p[0] for p in many), sum(p[1] for p in many)) for name, many in pairs.items()}

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order, on every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

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

    def close(self) -> None:
        """Leave the process group, if torchrun made one. Never waits for the others: one of them may have failed."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
