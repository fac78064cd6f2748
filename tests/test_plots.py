"""Oracles: the PNG file itself (signature and size in its header), and smoothing's own invariants."""

import math

import numpy as np
import pytest

from tunery.history import Evaluation, History, Step
from tunery.plots import MOST_POINTS, plot_eval_loss, plot_training_loss, smooth


def history(losses, evaluations=()):
    steps = [Step(i + 1, loss, 1, 1e-4, 1.0, 1, 1, 0.0, 0.1, 0.1) for i, loss in enumerate(losses)]
    return History(steps, [Evaluation(step, loss, 0.0, 0.0) for step, loss in evaluations])


def size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_both_pictures_are_drawn(tmp_path):
    run = history([2 * math.exp(-i / 30) for i in range(100)], [(50, 1.0), (100, 0.8)])
    assert plot_training_loss(run, tmp_path / "a.png") and plot_eval_loss(run, tmp_path / "b.png")
    assert size(tmp_path / "a.png") == size(tmp_path / "b.png") == (1152, 648)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("losses", [[1.0], [math.nan, 1.0, math.inf, 2.0], [1e-4, 3e4], [0.0, 0.0]])
def test_odd_curves_are_drawn(losses, tmp_path):
    assert plot_training_loss(history(losses), tmp_path / "a.png")


def test_nothing_to_draw_leaves_no_file(tmp_path):
    assert not plot_training_loss(history([math.nan]), tmp_path / "a.png")
    assert not plot_eval_loss(history([1.0], [(1, math.inf)]), tmp_path / "b.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_before_any_step_shows_the_evaluation(tmp_path):
    assert plot_eval_loss(history([], [(0, 2.0)]), tmp_path / "b.png")


def test_a_very_long_run_is_drawn_in_stretches(tmp_path):
    assert plot_training_loss(history([1.0] * (MOST_POINTS + 1)), tmp_path / "a.png")


def test_smoothing_keeps_a_constant_and_a_level_and_does_not_lag():
    assert smooth(np.full(50, 3.0)) == pytest.approx(3.0)
    noise = np.random.default_rng(0).normal(size=400)
    smoothed = smooth(noise)
    assert len(smoothed) == 400 and smoothed.std() < 0.3 * noise.std()
    ramp = np.arange(400, dtype=float)
    assert smooth(ramp)[50:350] == pytest.approx(ramp[50:350])
    assert smooth(np.array([1.0])) == pytest.approx(1.0)
