"""Oracles: files written for the test, and the same process with what oneDNN and torch keep when nobody says
otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunery import host

# Memory of its own that a process takes for products of ever other shapes once the engine is there, in MB.
GROWTH = """
import sys
import torch
from tunery.engine import Engine

def taken():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

Engine("float32")
weight = torch.ones(896, 1024, dtype=torch.bfloat16)
before = taken()
for rows in range(400, 900):
    torch.ones(rows, 896, dtype=torch.bfloat16) @ weight
print(taken() - before)
"""
NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def growth(**environment: str) -> float:
    env = {key: value for key, value in os.environ.items() if key not in NAMES} | environment
    done = subprocess.run([sys.executable, "-c", GROWTH], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_stands_still_when_every_step_has_other_shapes():
    usual = growth(**dict.fromkeys(NAMES, "1024"))
    if usual < 50:
        pytest.skip(f"this processor does not compile its products for each shape ({usual:.0f} MB)")
    assert growth() < 0.7 * usual


def test_free_memory_counts_files_that_are_only_kept_because_there_is_room(monkeypatch):
    """A container just after a download: its memory is full of file pages that would go at once. Worked by hand."""
    files = {
        "/proc/meminfo": "MemTotal: 200 kB\nMemAvailable:   100000 kB\n",
        "/sys/fs/cgroup/memory.max": "64000000\n",
        "/sys/fs/cgroup/memory.current": "62000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 40000000\nactive_file 5\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: files[str(self)])
    assert host.free_memory() == 42_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert host.free_memory() == 102_400_000
