"""Which examples share a stream: best-fit-decreasing packing, and an even cut of a step over ranks."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget` tokens; a longer one gets a bin of its own.

    Best-fit-decreasing uses at most 11/9 of the optimal number of bins + 1 (Johnson 1974). Deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[
        tuple[int, int]
    ] = []  # (free tokens, bin), sorted: the tightest bin that still fits is found by bisection
    for i in order:
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at < len(room):
            free, number = room.pop(at)
        else:
            free, number = budget, len(bins)
            bins.append([])
        bins[number].append(i)
        bisect.insort(room, (free - lengths[i], number))
    return bins


def partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of `lengths` in `parts` groups of nearly equal token sums: longest first, each to the lightest group
    (Graham's LPT rule). Within a group the original order is kept. Deterministic."""
    heap = [(0, part) for part in range(parts)]
    groups: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(heap)
        groups[part].append(i)
        heapq.heappush(heap, (load + lengths[i], part))
    return [sorted(group) for group in groups]
