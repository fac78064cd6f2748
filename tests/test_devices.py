"""Oracles: the makers' data sheets, by hand, and files written for the test."""

from __future__ import annotations

import json
import time

import pytest
import torch

from tunery import devices
from tunery.devices import GIB, KNOWN, Device, Rates, known_device, measured_rates, this_device
from tunery.errors import ConfigError


@pytest.mark.parametrize("name", ["4090", "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090"])
def test_a_device_goes_by_several_names(name):
    device = known_device(name)
    assert device.name == "4090" and device.kind == "cuda" and device.bfloat16
    assert 22 * GIB < device.memory < 24 * GIB
    assert device.rates.low == 0.75 * 165.2e12


def test_memory_tells_cards_of_one_name_apart():
    assert known_device("A100-80GB").memory > 1.9 * known_device("a100-40g").memory


def test_an_unknown_device_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'h100'") as error:
        known_device("h10O")
    assert all(name in str(error.value) for name in KNOWN)


def test_every_known_device_is_whole():
    for name in KNOWN:
        device = known_device(name)
        assert device.rates.low >= device.rates.wide > 1e12 and device.rates.bytes > 1e11, name
    assert not known_device("t4").bfloat16


def test_this_machine_has_memory_and_a_name():
    device = this_device("cpu")
    assert device.kind == "cpu" and 0 < device.memory < 2**44 and "threads" in device.name
    assert known_device("cpu").name == device.name


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    measured_rates.cache_clear()
    start = time.perf_counter()
    first = measured_rates("cpu", "Some processor, 2 threads")
    assert time.perf_counter() - start < 5
    (path,) = tmp_path.rglob("*.json")
    assert torch.__version__ in path.name and json.loads(path.read_text())["low"] == first.low
    measured_rates.cache_clear()
    monkeypatch.setattr(devices, "_measure", lambda device: pytest.fail("measured again"))
    assert measured_rates("cpu", "Some processor, 2 threads") == first
    measured_rates.cache_clear()


def test_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    rates = Rates(1.0, 2.0, 3.0, 4.0, False)
    monkeypatch.setattr(devices, "_measure", lambda device: rates)
    measured_rates.cache_clear()
    measured_rates("cpu", "x")
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    measured_rates.cache_clear()
    assert measured_rates("cpu", "x") == rates == Rates(**json.loads(path.read_text()))
    measured_rates.cache_clear()


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_bytes():
    rates = Rates(low=100.0, wide=10.0, bytes=5.0, launch=1.0, overlaps=False)
    assert rates.seconds(True, 200, 5) == 2.0
    assert rates.seconds(False, 200, 5) == 20.0
    assert rates.seconds(True, 0, 50) == 10.0


def test_a_device_without_a_table_is_measured():
    device = Device("x", "cpu", GIB, 0, 0.0, True, Rates(1, 1, 1, 1, False))
    assert device.rates.low == 1


def test_free_memory_counts_files_that_are_only_kept_because_there_is_room(monkeypatch):
    """A container just after a download: its memory is full of file pages that would go at once. Worked by hand."""
    from pathlib import Path

    from tunery import host

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
