"""What the machine has left, and what a process asks of its CPU's libraries by way of the environment, where the user
has not said otherwise. Loads nothing, so that a command can ask before torch is there."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path


def free_memory() -> int | None:
    """Bytes a process may still use here: what the system has free for it, within its container's limit; None where
    the system does not say. Files that are kept in memory only because there is room count as free."""
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not a Linux
        return None
    free = int(available[1]) * 1024 if available else None
    with suppress(OSError, ValueError):
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
        within = int(limit) - int(used) + (int(cached[1]) if cached else 0)
        free = max(0, within if free is None else min(free, within))
    return free


def wait_quietly() -> None:
    """Idle OpenMP threads must not spin against other processes. Read once, when torch loads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def keep_few_products() -> None:
    """A CPU's products are compiled for each shape and kept, 1,024 of them by oneDNN and as many by torch around it:
    with streams of ever other lengths that is a gigabyte, and no faster than with these. Read with the first such
    product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
