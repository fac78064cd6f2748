"""What a run's numbers say, in words, with the evidence. Pure functions of the history: no model, no files.

Every rule has to earn its place twice: it finds the trouble on a curve that has it, and keeps silent on an ordinary
noisy falling one. Noise is measured on the curve itself, so no rule knows what a normal loss is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, Literal

from tunery.history import Evaluation, History, Step

ENOUGH = 30  # steps below which no shape is read into a training curve
FEW = 0.01  # share of the rows that may be refused or truncated without a word


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`kind` is a fixed name to count or test by, `message` one or two sentences for a person with what to do,
    `evidence` the numbers they rest on. A "note" is worth knowing, a "warning" worth acting on."""

    kind: str
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    level: Literal["warning", "note"] = "warning"


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What became of the training data. `read` rows in the files, `used` of them trained on, `refused` reason ->
    rows, `truncated` rows cut to fit; `tokens` and `labelled` (trained) tokens of one epoch; `eval_rows`. `prompts`:
    the rows are prompts, whose answers are generated and learned from by rewards."""

    read: int = 0
    used: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    tokens: int = 0
    labelled: int = 0
    eval_rows: int = 0
    prompts: bool = False


def diagnose(history: History, counts: DataCounts | None = None, *, total_steps: int | None = None) -> list[Diagnosis]:
    """Everything there is to say, what was wrong from the start first. `total_steps`: of the planned run, so that a
    run in its warm-up is not judged by its first steps."""
    steps = history.steps
    found = [
        nothing_labelled(steps, counts),
        *(data_losses(counts) if counts else ()),
        learning_rate_too_high(steps) or not_learning(steps, total_steps),
        near_zero_at_once(steps),
        overfitting(steps, history.evaluations),
        no_evaluation(history, counts),
    ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


# ------------------------------------------------------------ the data


def nothing_labelled(steps: Sequence[Step], counts: DataCounts | None = None) -> Diagnosis | None:
    """Steps, or a whole data set, without a single token to learn from."""
    empty = [step.step for step in steps if step.weight == 0]
    if counts is not None and counts.tokens > 0 and counts.labelled == 0:
        return Diagnosis(
            "zero labelled tokens",
            f"None of the {counts.tokens:,} training tokens is trained on, so nothing can be learned. Look at what the "
            "template marks as the answer with `tunery inspect`; rows may lack an assistant turn.",
            {"tokens": counts.tokens, "labelled": 0},
        )
    if not empty:
        return None
    return Diagnosis(
        "zero labelled tokens",
        f"{len(empty)} of {len(steps)} steps had no token to train on (the first: step {empty[0]}). Look at the rows "
        "with `tunery inspect`: answers may be empty or have weight 0.",
        {"steps": len(empty), "of": len(steps), "first": empty[0]},
    )


def data_losses(counts: DataCounts) -> list[Diagnosis]:
    """Rows that were refused, and answers that were cut."""
    found = []
    refused = sum(counts.refused.values())
    if counts.read and refused / counts.read > FEW:
        by_reason = ", ".join(f"{reason}: {rows:,}" for reason, rows in _largest_first(counts.refused))
        found.append(
            Diagnosis(
                "dropped rows",
                f"{refused:,} of {counts.read:,} rows ({refused / counts.read:.1%}) were not used ({by_reason}). "
                "Repair them, raise data.max_length if they are too long, or accept that they are missing.",
                {"refused": dict(counts.refused), "read": counts.read, "share": refused / counts.read},
            )
        )
    if counts.used and counts.truncated / counts.used > FEW:
        share = counts.truncated / counts.used
        found.append(
            Diagnosis(
                "truncated answers",
                f"{counts.truncated:,} of {counts.used:,} rows ({share:.1%}) were cut to fit data.max_length, so the "
                "model sees less than was written. Raise data.max_length, or set data.too_long: drop.",
                {"truncated": counts.truncated, "used": counts.used, "share": share},
            )
        )
    return found


def no_evaluation(history: History, counts: DataCounts | None) -> Diagnosis | None:
    """Nothing held out: the training loss alone cannot tell learning from memorising."""
    if counts is None or counts.eval_rows or history.evaluations:
        return None
    return Diagnosis(
        "no evaluation",
        "No rows are held out, so nothing here can tell learning from memorising. Set data.eval to a file, or to a "
        "share of the training rows such as 0.05.",
        level="note",
    )


# ------------------------------------------------------------ the training curve


def learning_rate_too_high(steps: Sequence[Step]) -> Diagnosis | None:
    """The loss climbs and stays up, leaps again and again, or is no longer a number.

    Climbing: the medians of the newest two tenths of the steps (5 steps at least) both stand above that of an earlier
    tenth, by 20% and by seven standard errors. Leaping: twice or more, three steps on end stand at 2.5 times the
    level of the twenty before them, and far outside their scatter."""
    peak = max((step.lr for step in steps), default=0.0)
    advice = "Lower optimizer.lr (try a third of it), or lengthen schedule.warmup."
    bad = next((step for step in steps if not _finite(step)), None)
    if bad is not None:
        return Diagnosis(
            "learning rate too high",
            f"The loss or the gradient is not a finite number at step {bad.step} (loss {bad.loss}, gradient norm "
            f"{bad.grad_norm}). {advice}",
            {"step": bad.step, "loss": bad.loss, "grad_norm": bad.grad_norm, "lr": bad.lr},
        )
    if len(steps) < ENOUGH:
        return None
    return _climbing(steps, peak, advice) or _leaping(steps, peak, advice)


def _climbing(steps: Sequence[Step], peak: float, advice: str) -> Diagnosis | None:
    logs = [math.log(max(step.loss, 1e-6)) for step in steps]  # noise is a share of the loss, more or less
    width = max(5, len(steps) // 10)
    starts = range(len(steps) % width, len(steps) - width + 1, width)
    levels = [median(logs[start : start + width]) for start in starts]
    scatter = median(_scatter(logs[start : start + width]) for start in starts)
    now = min(levels[-1], levels[-2])
    # The very first steps stand for themselves: a run may be thrown off in its warm-up and never come back.
    earlier = [(max(logs[:3]), 0, 3), *((levels[i], starts[i], width) for i in range(len(levels) - 2))]

    def stands_above(low: float, size: int) -> bool:
        doubt = 7 * 1.25 * scatter / math.sqrt(size)  # a median's standard error is 1.25 that of a mean
        return now - low > max(math.log(1.2), doubt) and math.exp(now) - math.exp(low) > 0.05

    below = [place for place in earlier if stands_above(place[0], place[2])]
    if not below:
        return None
    low, began, size = min(below)
    at = steps[began + size // 2].step
    return Diagnosis(
        "learning rate too high",
        f"The training loss rises: about {math.exp(low):.3f} around step {at}, {math.exp(levels[-1]):.3f} now (step "
        f"{steps[-1].step}), with a peak learning rate of {peak:.1e}.{_norms(steps)} {advice}",
        {"lowest": math.exp(low), "lowest_step": at, "now": math.exp(levels[-1]), "step": steps[-1].step, "lr": peak},
    )


def _leaping(steps: Sequence[Step], peak: float, advice: str) -> Diagnosis | None:
    reach, leaps, i = 20, [], 20
    while i + 3 <= len(steps):
        before = [math.log(max(step.loss, 1e-6)) for step in steps[i - reach : i]]
        level = math.exp(median(before))
        # Three steps on end: one or two alone are hard rows, not a model that was thrown off and has to come back.
        now = median(step.loss for step in steps[i : i + 3])
        if now > max(2.5 * level, level + 0.5, level * math.exp(5 * _scatter(before))):
            leaps.append((steps[i].step, level, now))
            i += reach
        else:
            i += 1
    if len(leaps) < 2:
        return None
    step, level, now = max(leaps, key=lambda leap: leap[2])
    return Diagnosis(
        "learning rate too high",
        f"The training loss leaps up and has to come down again: {len(leaps)} times, the worst at step {step} from "
        f"{level:.3f} to {now:.3f}; the peak learning rate is {peak:.1e}.{_norms(steps)} {advice}",
        {"leaps": [leap[0] for leap in leaps], "worst_step": step, "from": level, "to": now, "lr": peak},
    )


def not_learning(steps: Sequence[Step], total_steps: int | None = None) -> Diagnosis | None:
    """The loss does not fall after the warm-up: its last third is not below its first third by 1% or one standard
    error, and two standard errors are less than 3%, so that noise hides no more. Judged after a quarter of the run."""
    judged = [step for step in steps[_end_of_warmup(steps) :] if math.isfinite(step.loss)]
    if len(judged) < max(ENOUGH, (total_steps or 0) // 4):
        return None
    third = len(judged) // 3
    first, last = ([step.loss for step in part] for part in (judged[:third], judged[-third:]))
    level, drop = fmean(first), fmean(first) - fmean(last)
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(third)
    if level < 0.1 or drop > max(0.01 * level, error) or 2 * error > 0.03 * level:
        return None
    peak = max(step.lr for step in judged)
    return Diagnosis(
        "not learning",
        f"The training loss does not fall: {level:.4f} over steps {judged[0].step}-{judged[third - 1].step}, "
        f"{fmean(last):.4f} over steps {judged[-third].step}-{judged[-1].step}. The learning rate ({peak:.1e} at most) "
        "may be too low, too little may be trainable (adapter.targets, adapter.rank), or the answers cannot be told "
        "from the prompts.",
        {"first": level, "last": fmean(last), "steps": len(judged), "lr": peak},
    )


def near_zero_at_once(steps: Sequence[Step]) -> Diagnosis | None:
    """Almost no loss in the first ten steps: there is nothing to learn, or the answer is in the prompt."""
    start = [step for step in steps[:10] if math.isfinite(step.loss) and step.weight > 0]
    if len(start) < 10 or start[0].step > 1:
        return None
    level = median(step.loss for step in start)
    if level >= 0.05:
        return None
    return Diagnosis(
        "loss near zero at once",
        f"The training loss is {level:.4f} within the first {len(start)} steps. The model may know these rows already, "
        "the prompt may contain the answer, or only a token or two of each row (such as the end of the turn) is "
        "trained: look at the weights with `tunery inspect`.",
        {"level": level, "steps": len(start)},
    )


# ------------------------------------------------------------ against the held-out rows


def overfitting(steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> Diagnosis | None:
    """Evaluation rises while training falls: every evaluation since the best is above it, the last by 2% (5% where
    only one has followed) and 0.01, while the training loss went on down. The one before training counts too."""
    if len(evaluations) < 2:
        return None
    best = min(evaluations, key=lambda evaluation: evaluation.eval_loss)
    since = [evaluation for evaluation in evaluations if evaluation.step > best.step]
    if not since:
        return None
    last = since[-1]
    share = 0.02 if len(since) > 1 else 0.05
    if not last.eval_loss - best.eval_loss > max(share * best.eval_loss, 0.01):
        return None
    span = max(1, (last.step - best.step) // 2)
    then = [step.loss for step in steps if best.step - span < step.step <= max(best.step, 1 + span // 4)]
    now = [step.loss for step in steps if last.step - span < step.step <= last.step]
    if not then or not now or fmean(now) >= fmean(then):
        return None
    if best.step == 0:
        advice = (
            "Training only made it worse: the held-out rows may be of another kind than the training rows (shuffle "
            "before splitting), or the learning rate is too high."
        )
    else:
        advice = (
            f"Step {best.step} is the best; train for fewer epochs, on more data, or stop early with eval.patience."
        )
    return Diagnosis(
        "overfitting",
        f"Overfitting since about step {best.step}: the held-out loss rose from {best.eval_loss:.4f} there "
        f"to {last.eval_loss:.4f} (step {last.step}) while the training loss fell from {fmean(then):.4f} to "
        f"{fmean(now):.4f}. {advice}",
        {
            "best_step": best.step,
            "best_eval_loss": best.eval_loss,
            "last_step": last.step,
            "last_eval_loss": last.eval_loss,
            "train_loss_then": fmean(then),
            "train_loss_now": fmean(now),
        },
    )


# ------------------------------------------------------------ measures


def _finite(step: Step) -> bool:
    return math.isfinite(step.loss) and (step.grad_norm is None or math.isfinite(step.grad_norm))


def _scatter(values: Sequence[float]) -> float:
    """Standard deviation by the median of the absolute deviations, which a few leaps cannot move."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def _end_of_warmup(steps: Sequence[Step]) -> int:
    """Index of the first step at the highest learning rate so far."""
    return max(range(len(steps)), key=lambda i: steps[i].lr, default=0)


def _norms(steps: Sequence[Step]) -> str:
    """A sentence about the gradient's norm where it grew tenfold; else nothing."""
    norms = [step.grad_norm for step in steps if step.grad_norm is not None]
    if len(norms) < 20:
        return ""
    width = max(5, len(norms) // 10)
    low = min(median(norms[i : i + width]) for i in range(0, len(norms) - width + 1, width))
    now = median(norms[-width:])
    return f" The gradient's norm grew from {low:.2g} to {now:.2g}." if now > 10 * low else ""


def _largest_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])
