"""Learning rates. Oracles: values worked by hand, and transformers' schedulers (whose warm-up is one update behind)."""

from __future__ import annotations

import math

import pytest

from tunery.config import validate
from tunery.errors import ConfigError
from tunery.schedule import ScheduleConfig, factor


def values(total: int, **config: object) -> list[float]:
    schedule = validate(ScheduleConfig, config)
    return [factor(schedule, step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "constant", "warmup": 0}, [1] * 10),
        ({"kind": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"kind": "linear", "warmup": 0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"kind": "linear", "warmup": 0.2}, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"kind": "linear", "warmup": 2, "min_ratio": 0.2}, [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        ({"kind": "wsd", "warmup": 2, "decay": 4}, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"kind": "wsd", "warmup": 0, "decay": 0.2, "min_ratio": 0.5}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.75]),
        ({"kind": "wsd", "warmup": 0, "decay": 0}, [1] * 10),
    ],
)
def test_by_hand(config, expected):
    assert values(10, **config) == pytest.approx(expected)


def test_cosine_by_hand():
    half = math.sqrt(0.5)
    assert values(4, kind="cosine", warmup=0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert values(4, kind="cosine", warmup=0, min_ratio=0.5)[2] == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(50, 0), (50, 5), (37, 0.1)])
def test_like_transformers(name, total, warmup):
    """The same from the end of the warm-up on; during it, ours is their next value: no update is spent at rate 0."""
    import torch
    from transformers import get_scheduler

    warm = math.ceil(warmup * total) if warmup < 1 else warmup
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = values(total, kind=name.removesuffix("_with_warmup"), warmup=warmup)
    assert ours[warm:] == pytest.approx(theirs[warm:], abs=1e-12)
    assert ours[:warm] == pytest.approx(theirs[1 : warm + 1], abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_always_a_share_of_the_peak(kind, total):
    rates = values(total, kind=kind)
    assert all(0 <= rate <= 1 for rate in rates) and rates[0] > 0
    assert max(rates) == pytest.approx(1)
    schedule = validate(ScheduleConfig, {"kind": kind})
    assert 0 <= factor(schedule, total + 3, total) <= 1, "beyond the end the rate stays at its last value"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"kind": "cosine", "decay": 0.2}, "decay is for wsd; cosine has none"),
        ({"kind": "constant", "min_ratio": 0.1}, "constant does not come down"),
        ({"warmup": 1.5}, "warmup: a share must be below 1"),
        ({"warmup": -1}, "warmup: must be greater than or equal to 0"),
        ({"min_ratio": 2}, "min_ratio: must be less than or equal to 1"),
        ({"kind": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_options_without_effect_are_refused(config, error):
    with pytest.raises(ConfigError, match=error):
        validate(ScheduleConfig, config)
