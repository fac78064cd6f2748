"""The preference comparison's arithmetic, not timings. Oracle: figures worked by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from bench.contestants import Contestant
from bench.dpo import Pairs, contestants, summarise, table


def run(seconds: float) -> dict:
    steps = [{"loss": 0.7, "seconds": s, "tokens": 10} for s in (50.0, 50.0, seconds, seconds)]
    return {"steps": steps, "peak_bytes": 2**30, "settings": {}, "load": 0.5}


def test_the_table_compares_with_tunery_and_says_what_sharing_saves():
    job = SimpleNamespace(batch_size=4, max_length=64)
    pairs = Pairs(job, Path("nowhere"), [100] * 16, [], 0.0, shared=[75] * 16)  # type: ignore[arg-type]
    field = [Contestant(name, "trl_dpo", "plain", "bf16") for name in ("tunery-bf16", "trl", "broken")]
    result = summarise(pairs, field, {"tunery-bf16": [run(1.0)], "trl": [run(4.0)], "broken": [{"error": "a | b"}]})
    assert [one.get("ratios") for one in result["contestants"]] == [[1.0], pytest.approx([4.0]), None]
    text = table(result)
    assert "16 pairs of dpo_en_demo (8 of them timed), 1,600 tokens" in text and "saves 25% of the tokens" in text
    assert "| trl | plain | 1.00 | 100 | 4.00 x | 1.00 GiB |" in text and "did not run: a / b" in text


def test_the_contestants_have_names_of_their_own():
    for precision in ("bf16", "fp32"):
        names = [one.name for one in contestants(precision)]
        assert names[0] == f"tunery-{precision}" and len(set(names)) == len(names) > 1
        assert {one.precision for one in contestants(precision)} == {precision}
