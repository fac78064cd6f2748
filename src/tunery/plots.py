"""The loss curves as pictures. matplotlib is imported when one is drawn, without its global state or a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunery.files import write_bytes
from tunery.history import Evaluation, History, Step

MOST_POINTS = 2000  # of a drawn line; longer curves are drawn as the means of equal stretches
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"


def plot_training_loss(history: History, path: Path) -> bool:
    """The loss of every step as a thin line, smoothed as a thick one, evaluations as points. False, and no file,
    if there is nothing to draw."""
    x, y = _curve(history.steps)
    if len(x) == 0:
        return False
    figure, axes = _figure("Training loss")
    every = math.ceil(len(history.steps) / MOST_POINTS)
    axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.8, label="each step" if every == 1 else f"mean of {every} steps")
    axes.plot(x, smooth(y), color=BLUE, linewidth=2.2, label="smoothed")
    points = _finite_evaluations(history.evaluations)
    if points:
        _draw_evaluations(axes, points)
    _finish(figure, axes, np.concatenate([y, [evaluation.eval_loss for evaluation in points]]), path)
    return True


def plot_eval_loss(history: History, path: Path) -> bool:
    """The evaluation loss, its best point marked, over the smoothed training loss. False, and no file, without
    evaluations."""
    points = _finite_evaluations(history.evaluations)
    if not points:
        return False
    figure, axes = _figure("Evaluation loss")
    x, y = _curve(history.steps)
    if len(x):
        axes.plot(x, smooth(y), color=BLUE, alpha=0.35, linewidth=1.6, label="training (smoothed)")
    _draw_evaluations(axes, points)
    best = min(points, key=lambda evaluation: evaluation.eval_loss)
    axes.annotate(
        f"{best.eval_loss:.4f}\nstep {best.step}",
        (best.step, best.eval_loss),
        xytext=(0, 14),
        textcoords="offset points",
        ha="right" if best.step == points[-1].step else "center",
        fontsize=9,
        color=ORANGE,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
    axes.plot([best.step], [best.eval_loss], "o", markersize=11, markerfacecolor="none", color=ORANGE)
    _finish(figure, axes, np.array([evaluation.eval_loss for evaluation in points]), path)
    return True


def plot_reward(history: History, path: Path) -> bool:
    """The mean reward of every rollout, smoothed, and of held-out prompts. False, and no file, where there is none."""
    pairs = [(step.step, step.metrics["reward"]) for step in history.steps if "reward" in step.metrics]
    curve = [(step, total / weight) for step, (total, weight) in pairs if weight]
    if not curve:
        return False
    x, y = np.array(curve, dtype=np.float64).T
    figure, axes = _figure("Reward", "reward")
    axes.plot(x, y, color=BLUE, alpha=0.3, linewidth=0.8, label="each rollout")
    axes.plot(x, smooth(y), color=BLUE, linewidth=2.2, label="smoothed")
    points = [(e.step, e.metrics["reward"]) for e in history.evaluations if "reward" in e.metrics]
    if points:
        steps, rewards = zip(*points, strict=True)
        axes.plot(steps, rewards, "o-", color=ORANGE, linewidth=1.2, markersize=5, label="held-out")
    _finish(figure, axes, np.append(y, 0.0), path)  # with a zero, so that the scale is a plain one
    return True


def smooth(values: np.ndarray) -> np.ndarray:
    """A Gaussian mean around each point (a fortieth of the curve wide), so that the line does not lag behind as a
    running average does; the ends average what there is. float64 [n] -> float64 [n]."""
    sigma = max(1.0, len(values) / 40)
    reach = min(math.ceil(3 * sigma), max(1, len(values) - 1))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)

    def spread(signal: np.ndarray) -> np.ndarray:
        return np.convolve(signal, kernel)[reach : reach + len(signal)]

    return spread(values) / spread(np.ones_like(values))


def _curve(steps: Sequence[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Step numbers and losses, finite ones only, at most MOST_POINTS."""
    kept = [(step.step, step.loss) for step in steps if math.isfinite(step.loss)]
    if not kept:
        return np.empty(0), np.empty(0)
    points = np.array(kept, dtype=np.float64)
    stretches = np.array_split(points, min(MOST_POINTS, len(points)))
    means = np.array([stretch.mean(axis=0) for stretch in stretches])
    return means[:, 0], means[:, 1]


def _finite_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of a loss; a reward has a picture of its own."""
    return [e for e in evaluations if math.isfinite(e.eval_loss) and "reward" not in e.metrics]


def _figure(title: str, what: str = "loss") -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(what)
    axes.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    return figure, axes


def _draw_evaluations(axes: Any, points: Sequence[Evaluation]) -> None:
    axes.plot(
        [evaluation.step for evaluation in points],
        [evaluation.eval_loss for evaluation in points],
        "o-",
        color=ORANGE,
        linewidth=1.2,
        markersize=5,
        label="evaluation",
    )


def _finish(figure: Any, axes: Any, values: np.ndarray, path: Path) -> None:
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 50 * low:
        axes.set_yscale("log")
    axes.margins(x=0.02, y=0.12)
    axes.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=144)
    write_bytes(path, picture.getvalue())
