"""What the machine has left."""

from __future__ import annotations

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
