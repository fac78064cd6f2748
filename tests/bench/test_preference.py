"""Figures worked by hand."""

from __future__ import annotations

import pytest
from bench.preference import shown, table


def test_thumbs_have_a_margin_between_their_means():
    one = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/chosen": 0.25, "rewards/rejected": -0.5, "epoch": 1}
    assert shown(one)["rewards/margins"] == pytest.approx(0.75) and "epoch" not in shown(one)
    assert shown({**one, "rewards/margins": 0.1})["rewards/margins"] == 0.1


def test_the_table_has_each_seed_and_their_mean():
    def evaluation(loss: float, right: float, margin: float) -> dict[str, float]:
        return {"loss": loss, "rewards/accuracies": right, "rewards/margins": margin}

    runs = [
        {"model": "m", "rows": "r.json", "seed": seed, "seconds": 3.2,
         "held_out": [evaluation(0.693, 0.0, 0.0), evaluation(*last)]}
        for seed, last in ((1, (0.6, 0.6, 0.2)), (2, (0.5, 0.8, 0.4)))
    ]  # fmt: skip
    lines = table(runs).splitlines()
    assert lines[2] == "| m | r.json | 1 | 0.693 to 0.600 | 0.0 to 60.0 | 0.000 to 0.200 | 3 |"
    assert lines[4] == "| m | r.json | mean | 0.693 to 0.550 | 0.0 to 70.0 | 0.000 to 0.300 |  |"
