"""Oracle: the definitions, on one rank; several ranks are in test_process.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunery.engine import Engine, Numbers, fast_bfloat16
from tunery.errors import ConfigError


def test_precision_by_device():
    engine = Engine()
    assert engine.dtype == (torch.bfloat16 if fast_bfloat16(engine.device) else torch.float32)
    assert Engine("float64").dtype == torch.float64
    with pytest.raises(ConfigError, match="float16"):
        Engine("float16")
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "flags" in (flags := cpuinfo.read_text()):
        assert fast_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_randomness_is_a_function_of_seed_step_and_rank():
    engine, drawn = Engine(), {}
    for key in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1), (1, 0, 0)):
        engine.seed(*key)
        value = torch.rand(4)
        assert key not in drawn or drawn[key].equal(value)
        drawn[key] = value
    assert len({tuple(v.tolist()) for v in drawn.values()}) == 4


def test_sums_and_gradients_of_one_rank():
    engine = Engine()
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    a.grad = torch.full((2,), 3.0)
    engine.sum_gradients([a, b])
    assert a.grad.tolist() == [3, 3] and b.grad is not None and b.grad.tolist() == [0, 0]
    assert engine.sum([1.0, 2]) == [1, 2]
    assert engine.sum_metrics({"loss": (2.0, 4.0)}) == {"loss": (2.0, 4.0)}
    assert Numbers(torch.tensor([1.0, 2.0])).read() == [1, 2]
    assert engine.gather("x") == ["x"] and engine.memory() > 1e6
