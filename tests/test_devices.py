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


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Tesla V100-SXM2-16GB", "v100-16g"), ("V100-PCIE-32GB", "v100-32g"), ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("RTX 2080 Ti", "2080-ti"), ("rtx2080ti", "2080-ti"), ("Quadro RTX A6000", "a6000"), ("Tesla T4", "t4"),
        ("H100 PCIe", "h100-pcie"), ("NVIDIA RTX 6000 Ada", "6000-ada"), ("Tesla P100", "p100"),
    ],
)  # fmt: skip
def test_names_as_drivers_and_shops_write_them(name, short):
    assert known_device(name).name == short


def test_memory_tells_cards_of_one_name_apart():
    assert known_device("A100-80GB").memory > 1.9 * known_device("a100-40g").memory
    assert known_device("v100-32g").memory > 1.9 * known_device("v100-16g").memory


def test_an_unknown_device_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'h100'") as error:
        known_device("h10O")
    assert all(name in str(error.value) for name in KNOWN)
    with pytest.raises(ConfigError, match="did you mean 'a100-80g' or 'a100-40g'"):
        known_device("a100")
    with pytest.raises(ConfigError, match="did you mean 'v100-32g' or 'v100-16g'"):
        known_device("Tesla V100")


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_not_this_machine(name):
    with pytest.raises(ConfigError, match="--device: is empty; leave it out for this machine"):
        known_device(name)


def test_a_device_of_this_machine_goes_by_torchs_name(monkeypatch):
    assert known_device("CPU") == this_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda:0: there is no CUDA device here"):
        known_device("cuda:0")
    gib = {0: (79 * GIB, 80 * GIB), 1: (10 * GIB, 24 * GIB)}
    index = lambda device=None: torch.device(device).index or 0  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: gib[index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {index(device)}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert known_device("cuda").name == known_device("cuda:0").name == this_device().name == "card 0"
    second = known_device("cuda:1")
    assert (second.name, second.kind, second.memory) == ("card 1", "cuda", 10 * GIB)  # what others leave
    with pytest.raises(ConfigError, match="cuda:2: there are 2 CUDA devices here"):
        known_device("cuda:2")


def test_every_known_device_is_whole():
    for name in KNOWN:
        device = known_device(name)
        assert device.rates.low >= device.rates.wide > 1e12 and device.rates.bytes > 1e11, name
        assert device.rates.host in (12.5e9, 25e9, 50e9) and device.rates.launch > 0, name
    assert not any(known_device(name).bfloat16 for name in ("t4", "v100-16g", "p100", "2080-ti"))


def test_this_machine_has_memory_and_a_name():
    device = this_device("cpu")
    assert device.kind == "cpu" and 0 < device.memory < 2**44 and "threads" in device.name
    assert known_device("cpu").name == device.name


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    measured_rates.cache_clear()
    start = time.perf_counter()
    first = measured_rates("cpu", "Some processor, 2 threads")
    assert time.perf_counter() - start < 15  # two seconds, and room for a busy machine
    (path,) = tmp_path.rglob("*.json")
    assert torch.__version__ in path.name and json.loads(path.read_text())["low"] == first.low
    measured_rates.cache_clear()
    monkeypatch.setattr(devices, "_measure", lambda device: pytest.fail("measured again"))
    assert measured_rates("cpu", "Some processor, 2 threads") == first
    measured_rates.cache_clear()


def test_what_an_older_version_measured_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    rates = Rates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, False)
    monkeypatch.setattr(devices, "_measure", lambda device: rates)
    measured_rates.cache_clear()
    measured_rates("cpu", "x")
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({"low": 1.0, "wide": 1.0, "bytes": 1.0, "launch": 1.0, "overlaps": False}))
    measured_rates.cache_clear()
    assert measured_rates("cpu", "x") == rates
    measured_rates.cache_clear()


def test_an_operation_of_a_step_costs_more_than_one_alone():
    """With Python, autograd and the dispatch around it; and shapes that are new cost a product in 16 bits no less."""
    one = torch.ones(1)
    start = time.thread_time()
    for _ in range(2000):
        one + one
    alone = (time.thread_time() - start) / 2000
    assert alone < devices._launch(torch.device("cpu")) < 1e-3
    assert 0 <= devices._fresh(torch.device("cpu")) < 0.1


def test_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path))
    rates = Rates(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, False)
    monkeypatch.setattr(devices, "_measure", lambda device: rates)
    measured_rates.cache_clear()
    measured_rates("cpu", "x")
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    measured_rates.cache_clear()
    assert measured_rates("cpu", "x") == rates == Rates(**json.loads(path.read_text()))
    measured_rates.cache_clear()


def test_an_operation_takes_the_longer_of_its_arithmetic_and_its_bytes():
    rates = Rates(low=100.0, wide=10.0, bytes=5.0, host=1.0, launch=1.0, fresh=0.0, overlaps=False)
    assert rates.seconds(True, 200, 5) == 2.0
    assert rates.seconds(False, 200, 5) == 20.0
    assert rates.seconds(True, 0, 50) == 10.0


def test_a_device_without_a_table_is_measured():
    device = Device("x", "cpu", GIB, 0, 0.0, True, Rates(1, 1, 1, 1, 1, 1, False))
    assert device.rates.low == 1
