"""What a run looks at between steps: one number for its held-out rows, the smaller the better, and others beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tunery.data.loader import WINDOW, Cut, Step, evaluation_steps, make_step
from tunery.evaluate.loss import evaluate
from tunery.report import NullReport, Report
from tunery.rollout.figures import scores_of
from tunery.rollout.rollouts import Rollouts
from tunery.setup import Run
from tunery.types import Sample


def held_out(run: Run, report: Report | NullReport, step: int) -> float:
    """Evaluate and report, and return what `eval.best` and `eval.patience` go by, the same on every rank; infinity
    (never the best) without held-out rows.

    It is the objective's loss, the mean by tokens. Where answers are generated, they are the likeliest ones to the
    held-out prompts: it is then their mean reward with its sign turned, or, without rewards, the loss on them of an
    objective that needs none. With both, the loss's other metrics are among the
    numbers."""
    if run.data.eval is None:
        return math.inf
    cut = replace(run.cut, budget=min(run.cut.budget, run.eval_tokens or run.cut.budget))
    if not isinstance(run.loader, Rollouts):
        metrics = _losses(run, report, evaluation_steps(run.data.eval, cut))
        loss = metrics.pop("loss")
    else:
        samples = run.loader.answered(run.data.eval, run.data.eval_examples)
        rewards = {name: value / weight for name, (value, weight) in scores_of(samples).items() if weight}
        metrics = {}
        if not getattr(run.objective, "needs_rewards", True):
            metrics = _losses(run, report, _steps(samples, cut))
        loss = metrics.pop("loss", 0.0)
        if "reward" in rewards:
            loss = -rewards["reward"]
        metrics = {**rewards, **metrics}
    report.evaluation(step, loss, metrics)
    return loss


def _steps(samples: Sequence[Sample], cut: Cut) -> Iterator[Step]:
    """The answers as evaluation_steps has the rows of a store."""
    for start in range(0, len(samples), WINDOW):
        part = samples[start : start + WINDOW]
        yield make_step([[sample.tokens] for sample in part], [sample.row for sample in part], cut)


def _losses(run: Run, report: Report | NullReport, steps: Iterable[Step]) -> dict[str, float]:
    def fall(how: Cut) -> None:
        run.eval_tokens = how.budget
        report.note(f"memory ran out in an evaluation; they go on with streams of {how.budget:,} tokens (same result)")

    return evaluate(run.objective, run.policy, run.model, steps, run.engine, fall)
