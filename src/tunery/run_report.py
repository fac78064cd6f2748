"""The files a finished run leaves for people and their scripts: results as JSON, trainer_state.json, the plots and
report.md. Names and keys are those of Hugging Face's Trainer and LLaMA-Factory where they have one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from tunery.diagnose import DataCounts, Diagnosis
from tunery.files import write_json
from tunery.history import History, Step


@dataclass(frozen=True, slots=True)
class Outcome:
    """Held-out scores by generation, name -> value, and rows {prompt, label, before, after}."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: Sequence[Mapping[str, str]]


@dataclass(slots=True)
class Facts:
    """All that the files tell of. `elapsed` seconds from start to end; `model_step` the step whose weights the run
    ended with; `job` the resolved configuration; `versions` library -> version."""

    history: History
    total_steps: int
    total_epochs: float
    elapsed: float
    model_step: int
    mfu: float | None = None
    counts: DataCounts | None = None
    diagnoses: Sequence[Diagnosis] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    outcome: Outcome | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def window_means(steps: Sequence[Step]) -> dict[str, float]:
    """The exact mean loss and metrics over several steps: sums over sums, never an average of averages."""
    weight = math.fsum(step.weight for step in steps)
    means = {"loss": math.fsum(step.loss * step.weight for step in steps) / weight if weight else math.nan}
    for name in dict.fromkeys(name for step in steps for name in step.metrics):
        pairs = [step.metrics[name] for step in steps if name in step.metrics]
        total = math.fsum(pair[1] for pair in pairs)
        means[name] = math.fsum(pair[0] for pair in pairs) / total if total else math.nan
    return means


def tokens_per_second(steps: Sequence[Step]) -> float:
    """Real tokens per second of training: the time of evaluating and saving is left out."""
    seconds = math.fsum(step.seconds for step in steps)
    return sum(step.tokens for step in steps) / seconds if seconds > 0 else 0.0


def results(facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
    """train_results.json and eval_results.json. Rates are over the whole run time, evaluation included, as in
    Hugging Face's Trainer; `train_steps_seconds` is the time in steps alone."""
    steps, seconds = facts.history.steps, max(facts.elapsed, 1e-9)
    epoch = round(steps[-1].epoch, 4) if steps else 0.0
    train = {
        "epoch": epoch,
        "train_loss": window_means(steps)["loss"] if steps else math.nan,
        "train_runtime": round(facts.elapsed, 4),
        "train_samples_per_second": round(sum(step.examples for step in steps) / seconds, 3),
        "train_steps_per_second": round(len(steps) / seconds, 3),
        "train_tokens_per_second": round(sum(step.tokens for step in steps) / seconds, 3),
        "train_steps_seconds": round(math.fsum(step.seconds for step in steps), 4),
        "num_input_tokens_seen": sum(step.tokens for step in steps),
    }
    evaluation = facts.history.evaluation_at(facts.model_step)
    if evaluation is None:
        return train, {}
    return train, {
        "epoch": round(evaluation.epoch, 4),
        "eval_loss": evaluation.eval_loss,
        "eval_perplexity": perplexity(evaluation.eval_loss),
        **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
    }


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def write_run_folder(
    folder: Path, facts: Facts, train_metrics: Mapping[str, Any], eval_metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything; give back what all_results.json holds."""
    train, evaluation = results(facts)
    train |= train_metrics
    evaluation |= eval_metrics
    write_json(folder / "train_results.json", train)
    if evaluation:
        write_json(folder / "eval_results.json", evaluation)
    everything = {**train, **evaluation}
    write_json(folder / "all_results.json", everything)
    return everything


def comparison_tables(outcome: Outcome) -> list[Table]:
    return []
