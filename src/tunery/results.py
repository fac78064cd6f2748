"""A finished run's results as JSON, with the names and keys of Hugging Face's Trainer and LLaMA-Factory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.diagnose import DataCounts, Diagnosis
from tunery.history import History, Step, tokens_per_second, window_means


@dataclass(frozen=True, slots=True)
class Outcome:
    """Held-out scores by generation, name -> value, and rows {prompt, label, before, after}."""

    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: Sequence[Mapping[str, str]]


@dataclass(slots=True)
class Facts:
    """All that a run's files tell of. `elapsed` seconds from start to end; `model_step` the step whose weights the
    run ended with; `flops` useful FLOPs done; `job` the resolved configuration; `versions` library -> version."""

    history: History
    total_steps: int
    total_epochs: float
    log_every: int
    elapsed: float
    model_step: int
    flops: float | None = None
    mfu: float | None = None
    counts: DataCounts | None = None
    diagnoses: Sequence[Diagnosis] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    outcome: Outcome | None = None
    job: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def train_results(facts: Facts) -> dict[str, Any]:
    """train_results.json. As in Hugging Face's Trainer the rates are over the whole run time, evaluation and saving
    included; `train_steps_seconds` is the time in steps alone, and `tokens_per_second` the rate over that."""
    steps, seconds = facts.history.steps, max(facts.elapsed, 1e-9)
    values = {
        "epoch": _epoch(facts.history),
        "train_loss": window_means(steps)["loss"],
        "train_runtime": round(facts.elapsed, 4),
        "train_samples_per_second": round(sum(step.examples for step in steps) / seconds, 3),
        "train_steps_per_second": round(len(steps) / seconds, 3),
        "train_tokens_per_second": round(sum(step.tokens for step in steps) / seconds, 3),
        "train_steps_seconds": round(math.fsum(step.seconds for step in steps), 4),
        "tokens_per_second": round(tokens_per_second(steps), 3),
        "num_input_tokens_seen": sum(step.tokens for step in steps),
        "total_flos": facts.flops,
        "mfu": facts.mfu,
    }
    return {name: value for name, value in values.items() if value is not None}


def eval_results(facts: Facts) -> dict[str, Any]:
    """eval_results.json, of the weights that the run ended with; empty if those were never evaluated."""
    evaluation = facts.history.evaluation_at(facts.model_step)
    if evaluation is None:
        return {}
    return {
        "epoch": round(evaluation.epoch, 4),
        "eval_loss": evaluation.eval_loss,
        **({"eval_perplexity": perplexity(evaluation.eval_loss)} if of_likelihood(evaluation.metrics) else {}),
        **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
    }


def outcome_results(outcome: Outcome | None) -> dict[str, float]:
    """Scores by generation, as before_<name> and after_<name>."""
    if outcome is None:
        return {}
    before = {f"before_{name}": value for name, value in outcome.before.items()}
    return before | {f"after_{name}": value for name, value in outcome.after.items()}


def trainer_state(facts: Facts, results: Mapping[str, Any]) -> dict[str, Any]:
    """trainer_state.json: `log_history` has the entries that Hugging Face's Trainer would, in order of step."""
    history, best = facts.history, facts.history.best
    entries: list[dict[str, Any]] = []
    for window in windows(history.steps, facts.log_every):
        last = window[-1]
        entry = {"epoch": round(last.epoch, 4), "grad_norm": last.grad_norm, "learning_rate": last.lr}
        entries.append(entry | window_means(window) | {"step": last.step})
    for evaluation in history.evaluations:
        metrics = {f"eval_{name}": value for name, value in evaluation.metrics.items()}
        entry = {"epoch": round(evaluation.epoch, 4), "eval_loss": evaluation.eval_loss}
        entries.append(entry | metrics | {"step": evaluation.step})
    entries.sort(key=lambda entry: (entry["step"], "eval_loss" in entry))
    summary = {name: value for name, value in results.items() if name.startswith("train_")}
    entries.append({"epoch": _epoch(history), "step": history.last_step} | summary)
    return {
        "best_global_step": best.step if best else None,
        "best_metric": best.eval_loss if best else None,
        "epoch": _epoch(history),
        "global_step": history.last_step,
        "is_world_process_zero": True,
        "log_history": entries,
        "logging_steps": facts.log_every,
        "max_steps": facts.total_steps,
        "model_step": facts.model_step,
        "num_input_tokens_seen": sum(step.tokens for step in history.steps),
        "num_train_epochs": facts.total_epochs,
        "total_flos": facts.flops,
    }


def windows(steps: Sequence[Step], log_every: int) -> list[list[Step]]:
    """The steps of each line of the log: up to each multiple of `log_every`, and the rest."""
    found: list[list[Step]] = []
    for step in steps:
        if not found or (found[-1][-1].step - 1) // log_every != (step.step - 1) // log_every:
            found.append([])
        found[-1].append(step)
    return found


def of_likelihood(metrics: Iterable[str]) -> bool:
    """Whether a loss with these metrics beside it is a mean negative log-likelihood, which has a perplexity: those of
    preference and reinforcement objectives report rewards, and those that add something to it, or weigh it, report the
    likelihood itself."""
    return not any(name.partition("/")[0] in ("reward", "rewards", "nll") for name in metrics)


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _epoch(history: History) -> float:
    return round(history.steps[-1].epoch, 4) if history.steps else 0.0
