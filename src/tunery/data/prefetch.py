"""The next step's streams are made ready while this one is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from tunery.data.loader import Step


class Steps(Protocol):
    """What has steps to give: data/loader.py."""

    def step(self, step: int, /) -> Step: ...


class Prefetcher:
    """A loader's steps, in order, up to number `total` (exclusive): while the caller works on one, a thread reads, cuts
    and collates the next. For a CUDA `device` its arrays are then in pinned memory, which the device can copy from
    while everything else goes on.

    Nothing else changes: `step(n)` is what the loader gives for n, whatever was asked before, and what the loader
    raises for n is raised there. A loader that is `live`, because its steps depend on the weights, is asked when a step
    is wanted, and nothing is begun ahead. Two steps exist at a time, the caller's and the one ahead. A context manager:
    leaving it, by an error too, waits for the thread to end."""

    def __init__(self, loader: Steps, total: int, device: torch.device):
        self.loader, self.total = loader, total
        self.pinned = device.type == "cuda"
        # pinning belongs to a device, and a new thread's current one is the first
        on_device: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (device,)} if self.pinned else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tunery-data", **on_device)
        self._ahead: tuple[int, Future[Step]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def step(self, step: int) -> Step:
        """Step `step`; the one after it is begun."""
        if getattr(self.loader, "live", False):
            return self._make(step)
        if self._ahead is None or self._ahead[0] != step:
            self._begin(step)
        assert self._ahead is not None
        _, made = self._ahead
        self._ahead = None
        work = made.result()
        if step + 1 < self.total:
            self._begin(step + 1)
        return work

    def _begin(self, step: int) -> None:
        self._ahead = (step, self._thread.submit(self._make, step))

    def _make(self, step: int) -> Step:
        work = self.loader.step(step)
        if self.pinned:
            work.micro = [batch.pin_memory() for batch in work.micro]
        return work
