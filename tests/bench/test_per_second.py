"""Figures worked by hand."""

from __future__ import annotations

import pytest
from bench.contestants import Contestant
from bench.per_second import chosen, per_second, spread, summarise, table


def run(seconds: float) -> dict:
    steps = [{"loss": 0.7, "seconds": s, "tokens": 10} for s in (50.0, 50.0, seconds, seconds)]
    return {"steps": steps, "peak_bytes": 2**30, "settings": {}, "load": 0.5}


def test_the_warm_up_is_left_out():
    assert per_second(run(2.0), 4) == 2.0


def test_rounds_are_compared_with_those_of_the_same_number():
    field = [Contestant(name, "x", "plain", "bf16") for name in ("ours", "theirs")]
    broken = {"error": "it broke"}
    lines = summarise(field, {"ours": [run(1.0), broken, run(2.0)], "theirs": [run(4.0), run(2.0), run(4.0)]}, 8, 10.0)
    assert lines[1]["ratios"] == pytest.approx([4.0, 2.0])
    assert lines[0]["per_second"] == pytest.approx(6.0) and lines[0]["tokens_per_second"] == pytest.approx(60.0)
    assert "| theirs | plain | 2.00 | 20 | 3.00 x (2.00 to 4.00) | 1.00 GiB | 0.7000 to 0.7000 | 0.5 |" in table(
        lines, "samples"
    )


def test_a_rival_that_nobody_is_is_refused():
    field = [Contestant(name, "x", "plain", "bf16") for name in ("tunery-bf16", "trl-bf16", "trl-fast")]
    assert [one.name for one in chosen(field, ["trl-b"])] == ["tunery-bf16", "trl-bf16"]
    assert chosen(field, [""]) == field
    with pytest.raises(ValueError, match="no rival 'trl-bf61'"):
        chosen(field, ["trl-bf61"])


def test_one_round_has_no_spread():
    assert spread([2.0]) == "2.00 x" and spread([]) == ""
