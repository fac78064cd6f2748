"""A job on a device: what it needs with given micro-batches and on a given rung, and which of them to take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch

from tunery.config import build
from tunery.devices import Device
from tunery.engine import DTYPES
from tunery.flops import cost_of, flops_per_token
from tunery.job import Job
from tunery.memory import Operation, Peak, Profile
from tunery.plan.shadow import Shadow, Stream, optimizer_cost, trace
from tunery.plan.work import Rows, Work, work_of

RUNGS = ("none", "selective", "full", "offload")
# Tokens of a micro-batch from which on a device is busy: more only cost memory.
ENOUGH = {"cuda": 16384, "cpu": 2048}
# A rung that recomputes is taken rather than micro-batches smaller than this.
SMALL = {"cuda": 4096, "cpu": 512}


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step, by what holds them. `host`: beside the device, where activations are
    offloaded. The parts are a bar's, in order."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    temporaries: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Planner:
    """Answers about one job on one device. Nothing is loaded: the model is shapes. Raises ModelError and ConfigError
    for a model or an adapter that cannot be."""

    def __init__(self, job: Job, rows: Rows, device: Device, world: int = 1):
        self.job, self.rows, self.device, self.world = job, rows, device, world
        self.dtype = dtype_on(job.model.dtype, device)
        self.shadow = Shadow(job, self.dtype)
        self.objective = build("objectives", job.objective)
        self.work = lru_cache(maxsize=None)(self._work)
        self.profile = lru_cache(maxsize=None)(self._profile)

    def _work(self, micro_tokens: int) -> Work:
        return work_of(self.job, self.rows, micro_tokens, self.world)

    def _profile(self, stream: Stream, rung: str, accumulates: bool) -> Profile:
        run_on = "full" if rung == "offload" else rung
        return trace(self.shadow, self.objective, stream, run_on, device=self.device.kind, accumulates=accumulates)

    @cached_property
    def optimizer(self) -> tuple[int, int, Counter[Operation]]:
        return optimizer_cost(self.job, self.shadow)

    # -------------------------------------------------------- memory

    def memory(self, micro_tokens: int, rung: str) -> Memory:
        """With the longest stream that such micro-batches give."""
        work = self.work(micro_tokens)
        profile = self.profile(work.largest, rung, work.accumulates)
        peaks = profile.peaks()
        if rung == "offload":
            peaks = [self._offloaded(peak, work.largest) for peak in peaks]
        state, scratch, _ = self.optimizer
        peaks.append(Peak("update", self.shadow.gradient_bytes, 0, 0, scratch + self._exchange()))
        worst = max(peaks, key=lambda peak: peak.dynamic)
        slack = int(self.device.slack * (worst.activations + worst.logits + worst.temporaries))
        return Memory(
            self.shadow.weight_bytes, state, worst.gradients, worst.activations, worst.logits, worst.temporaries,
            self.device.overhead + slack,
        )  # fmt: skip

    def _offloaded(self, peak: Peak, stream: Stream) -> Peak:
        """As on the rung full, with each layer's input on the host but for two on their way."""
        if self.device.kind == "cpu":
            return peak
        one = stream.tokens * self.shadow.hidden_bytes
        away = max(0, len(self.shadow.layers) - 2) * one
        return Peak(peak.phase, peak.gradients, max(0, peak.activations - away), peak.logits, peak.temporaries)

    def _exchange(self) -> int:
        """Gradients of several ranks are summed in one flat buffer."""
        return self.shadow.gradient_bytes if self.world > 1 else 0

    # -------------------------------------------------------- time

    def seconds(self, micro_tokens: int, rung: str) -> float:
        """Of a mean optimizer step."""
        work, rates = self.work(micro_tokens), self.device.rates
        sizes = [size for step in work.streams for size in step]
        high = max(256, round(sum(sizes) / len(sizes)))
        low = max(128, high // 2)
        times = [self._stream_seconds(work.typical(size), rung, work.accumulates) for size in (low, high)]
        slope = (times[1] - times[0]) / (high - low)
        streams = sum(max(times[1] + slope * (size - high), 0.0) for size in sizes) / len(work.streams)
        update = sum(often * rates.seconds(*operation) for operation, often in self.optimizer[2].items())
        return streams + update

    def _stream_seconds(self, stream: Stream, rung: str, accumulates: bool) -> float:
        rates = self.device.rates
        operations = self.profile(stream, rung, accumulates).work()
        launch = rates.launch * sum(operations.values())
        busy = sum(often * rates.seconds(*operation) for operation, often in operations.items())
        return max(launch, busy) if rates.overlaps else launch + busy

    @cached_property
    def flops_per_token(self) -> float:
        """Useful ones (see flops.py)."""
        work = self.work(self.job.train.micro_tokens or self.job.data.max_length)
        return flops_per_token(cost_of(self.shadow.model), labelled=work.labelled, mean_length=work.mean_length)


def dtype_on(name: str, device: Device) -> torch.dtype:
    """The arithmetic's, where `auto` is bfloat16 if the hardware has it."""
    if name == "auto":
        return torch.bfloat16 if device.bfloat16 else torch.float32
    return DTYPES[name]
