"""A job on a device: what it needs with given micro-batches and on a given rung, and which of them to take."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from tunery.config import build
from tunery.critic import needs_critic
from tunery.devices import Device
from tunery.engine import DTYPES
from tunery.flops import cost_of, flops_per_token
from tunery.job import Job
from tunery.memory import Operation, Peak, Profile, TooMany, in_backward
from tunery.models.load import load_config
from tunery.plan.closed_form import closed_form, inner_size
from tunery.plan.shadow import Shadow, Stream, optimizer_cost, trace
from tunery.plan.work import Rows, Work, work_of

# Tokens of a micro-batch from which on a device is busy: more only cost memory. On a CPU this holds of small layers:
# the arithmetic of larger ones outweighs sooner what a micro-batch costs whatever its length (the start of each
# operation, and oneDNN's new products). FEWEST let the products themselves run at their best.
ENOUGH = {"cuda": 16384, "cpu": 2048}
SMALL_LAYER, FEWEST = 3_000_000, 512
STEP = 256  # micro-batches are a multiple of so many tokens, unless the longest example wants more
# Shares of the longest stream that are run: the rest is straight in between, as nearly all of it is.
POINTS = (1 / 16, 1 / 2, 1)


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment of a step, by what holds them. The parts are those of a bar, in
    order."""

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


@dataclass(frozen=True)
class Line:
    """Bytes that come and go, and seconds, of one micro-batch on a rung: found for a few numbers of `tokens`, and
    straight in between. `least`: seconds that it takes to launch."""

    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    time: tuple[float, ...]
    least: float

    def memory(self, tokens: int) -> int:
        return round(self._at(self.bytes, tokens))

    def seconds(self, tokens: int) -> float:
        return max(self.least, self._at(self.time, tokens))

    def _at(self, values: tuple[float, ...], tokens: int) -> float:
        last = len(self.tokens) - 1
        i = min(max(1, bisect_left(self.tokens, tokens)), last)
        low, high = self.tokens[i - 1 : i + 1]
        return values[i - 1] + (values[i] - values[i - 1]) * (tokens - low) / (high - low)


def most_tokens(job: Job, rows: Rows, device: Device) -> int:
    """Tokens of the largest micro-batch that is any use: of the longest example, and as many as keep the device busy.
    Where the model itself trains, each micro-batch also adds up gradients of its size, and experts share its tokens; so
    there a CPU gets the most."""
    if job.train.micro_tokens is not None:
        return job.train.micro_tokens
    enough = ENOUGH[device.kind]
    config = load_config(job.model).get_text_config()
    if device.kind == "cpu" and not build("adapters", job.adapter).whole and experts_of(config) == 1:
        layer = layer_parameters(config)
        enough = min(enough, max(FEWEST, math.ceil(enough * SMALL_LAYER / layer / STEP) * STEP))
    return max(enough, int(rows.lengths.max()))


def experts_of(config: Any) -> int:
    """Experts of a layer, by a config.json; 1 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(filter(None, (getattr(config, name, None) for name in names)), 1)


def layer_parameters(config: Any, experts: int = 1) -> int:
    """Of attention and a gated MLP, or `experts` of them, by the sizes in a config.json at a glance."""
    hidden = config.hidden_size
    return 4 * hidden**2 + 3 * hidden * inner_size(config) * experts


class Planner:
    """Answers about one job on one device, with micro-batches of up to `most` tokens. Nothing is loaded: the model is
    shapes. Raises ModelError and ConfigError for a model or an adapter that cannot be."""

    models = 1  # that train beside one another, alike

    def __init__(self, job: Job, rows: Rows, device: Device, world: int = 1):
        self.job, self.rows, self.device, self.world = job, rows, device, world
        self.dtype = dtype_on(job.model.dtype, device)
        self.shadow = Shadow(job, self.dtype)
        self.objective = build("objectives", job.objective)
        if needs_critic(self.objective):
            self.models = 2
        self.note: str | None = None  # what is not as good as usual
        self.most = most_tokens(job, rows, device)
        self.work = lru_cache(maxsize=None)(self._work)
        self._traced = lru_cache(maxsize=None)(self._trace)
        self.line = lru_cache(maxsize=None)(self._line)

    def with_overhead(self, overhead: int) -> Planner:
        """The same about a device with another overhead; what was run on shapes is not run again."""
        other = copy(self)
        other.device = replace(self.device, overhead=overhead)
        return other

    def _work(self, micro_tokens: int) -> Work:
        return work_of(self.job, self.rows, micro_tokens, self.world)

    def profile(self, stream: Stream, rung: str, accumulates: bool) -> Profile:
        """Of one micro-batch. What is offloaded is run as on the rung full."""
        return self._traced(stream, "full" if rung == "offload" else rung, accumulates)

    def _trace(self, stream: Stream, rung: str, accumulates: bool) -> Profile:
        device = self.device.kind
        if self.note is not None:  # what failed once fails again, and rungs are to be compared
            return closed_form(self.shadow, stream, rung, device, accumulates)
        try:
            return trace(self.shadow, self.objective, stream, rung, device=device, accumulates=accumulates)
        except Exception as error:  # a model's own code, which may do anything
            first_line = str(error).partition("\n")[0]
            self.note = f"by formula, since the model's code does not run on shapes alone ({first_line[:120]})"
            if isinstance(error, TooMany):
                self.note += "; without the family's own kernels it is slower than this"
            return closed_form(self.shadow, stream, rung, device, accumulates)

    def _line(self, rung: str, reading: bool = False) -> Line:
        """Up to the longest stream of all; `reading` as `seconds`."""
        work = self.work(self.most)
        streams = [work.typical(max(8 + i, int(share * work.largest.tokens))) for i, share in enumerate(POINTS)]
        profiles = [self.profile(stream, rung, work.accumulates) for stream in streams]
        both = list(zip(profiles, streams, strict=True))
        return Line(
            tuple(stream.tokens for stream in streams),
            tuple(self._dynamic(profile, stream, rung) for profile, stream in both),
            tuple(self._busy(profile, stream, rung, reading) for profile, stream in both),
            self.device.rates.launch * sum(profiles[0].work(self._part(reading)).values()),
        )

    @cached_property
    def optimizer(self) -> tuple[int, int, Counter[Operation]]:
        state, scratch, work = optimizer_cost(self.job, self.shadow)
        both = Counter({operation: often * self.models for operation, often in work.items()})
        return state * self.models, scratch * self.models, both

    # -------------------------------------------------------- memory

    def memory(self, micro_tokens: int, rung: str) -> Memory:
        """With the longest stream that such micro-batches give."""
        work = self.work(micro_tokens)
        profile = self.profile(work.largest, rung, work.accumulates)
        peaks = self._peaks(profile, work.largest, rung)
        state, scratch, _ = self.optimizer
        peaks.append(Peak("update", self.models * self.shadow.gradient_bytes, 0, 0, scratch + self._exchange()))
        worst = max(peaks, key=lambda peak: peak.dynamic)
        slack = int(self.device.slack * (worst.activations + worst.logits + worst.temporaries))
        return Memory(
            self._weights, state, worst.gradients, worst.activations, worst.logits, worst.temporaries,
            self.device.overhead + slack,
        )  # fmt: skip

    def about(self, micro_tokens: int, rung: str) -> int:
        """The same, nearly, without running anything: bytes in all."""
        moving = self.line(rung).memory(self.work(micro_tokens).largest.tokens)
        fixed = self._weights + self.optimizer[0] + self.device.overhead
        return fixed + moving + int(self.device.slack * moving)

    @property
    def _weights(self) -> int:
        shadow, trained = self.shadow, self.shadow.gradient_bytes  # as wide as its gradients
        return shadow.weight_bytes + shadow.teacher_bytes + shadow.reward_bytes + (self.models - 1) * trained

    def _peaks(self, profile: Profile, stream: Stream, rung: str) -> list[Peak]:
        """Of one micro-batch. Offloaded are, as against the rung full, each layer's input but for two on their way."""
        peaks = profile.peaks()
        if self._offloads(rung):
            away = max(0, self._inputs - 2) * stream.tokens * self.shadow.hidden_bytes
            peaks = [replace(peak, activations=max(0, peak.activations - away)) for peak in peaks]
        return [
            replace(peak, gradients=self.models * peak.gradients, activations=self.models * peak.activations)
            for peak in peaks
        ]

    def _offloads(self, rung: str) -> bool:
        """A CPU has no other memory to put anything in."""
        return rung == "offload" and self.device.kind != "cpu"

    @property
    def _inputs(self) -> int:
        """Layers that keep their input for a backward."""
        return len(self.shadow.layers) - self.shadow.below

    def _dynamic(self, profile: Profile, stream: Stream, rung: str) -> int:
        return max(peak.dynamic for peak in self._peaks(profile, stream, rung))

    def _exchange(self) -> int:
        """Gradients of several ranks are summed in one flat buffer."""
        return self.models * self.shadow.gradient_bytes if self.world > 1 else 0

    # -------------------------------------------------------- time

    def seconds(self, micro_tokens: int, rung: str, reading: bool = False) -> float:
        """Of a mean optimizer step; with `reading` of one that begins with what the frozen layers gave before."""
        steps = self.work(micro_tokens).streams
        return sum(self.step_seconds(streams, rung, reading) for streams in steps) / len(steps)

    def step_seconds(self, streams: Sequence[int], rung: str, reading: bool = False) -> float:
        """Of a step with streams of so many tokens."""
        line = self.line(rung, reading)
        return sum(line.seconds(tokens) for tokens in streams) + self._time(self.optimizer[2])

    def _busy(self, profile: Profile, stream: Stream, rung: str, reading: bool = False) -> float:
        """Seconds of one micro-batch, of all models that train. Layers' inputs go to the host beside the forward, and
        come back beside the backward: whichever of both takes longer."""
        part = self._part(reading)
        products = profile.products(part)
        if not self._offloads(rung):
            return self.models * self._time(profile.work(part), products)
        copies = self._inputs * stream.tokens * self.shadow.hidden_bytes / self.device.rates.host
        forward = self._time(profile.work(lambda name: part(name) and not in_backward(name)), products)
        return self.models * (max(copies, forward) + max(copies, self._time(profile.work(in_backward))))

    def _part(self, reading: bool) -> Callable[[Hashable], bool]:
        """The spans that are run: `reading`, all but the forwards of layers without a backward, which are of kinds of
        their own."""
        below = {("forward", kind) for kind in self.shadow.layers[: self.shadow.below]} if reading else ()
        return lambda name: name not in below

    def _time(self, operations: Counter[Operation], products: int = 0) -> float:
        """Seconds of operations, with so many different shapes of products in 16 bits."""
        rates = self.device.rates
        launch = rates.launch * sum(operations.values()) + rates.fresh * products
        busy = sum(often * rates.seconds(*operation) for operation, often in operations.items())
        return max(launch, busy) if rates.overlaps else launch + busy

    def executed_flops(self, micro_tokens: int, rung: str, reading: bool = False) -> float:
        """Of a token, whatever they are for: what is recomputed and the masked part of attention included; `reading` as
        `seconds`."""
        stream = self.work(micro_tokens).largest
        work = self.profile(stream, rung, self.work(micro_tokens).accumulates).work(self._part(reading))
        return sum(flops * often for (_, flops, _), often in work.items()) / stream.tokens

    @cached_property
    def flops_per_token(self) -> float:
        """Useful ones (see flops.py)."""
        work = self.work(self.most)
        return flops_per_token(cost_of(self.shadow.model), labelled=work.labelled, mean_length=work.mean_length)


def dtype_on(name: str, device: Device) -> torch.dtype:
    """The arithmetic's, where `auto` is bfloat16 if the hardware has it."""
    if name == "auto":
        return torch.bfloat16 if device.bfloat16 else torch.float32
    return DTYPES[name]
