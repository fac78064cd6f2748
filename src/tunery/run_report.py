"""What a finished run leaves for people: report.md, the plots, and the tables of before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from tunery.diagnose import DataCounts, Diagnosis
from tunery.files import write_json, write_text
from tunery.plots import plot_eval_loss, plot_reward, plot_training_loss
from tunery.progress import clock_text, human
from tunery.results import (
    Facts,
    Outcome,
    eval_results,
    of_likelihood,
    outcome_results,
    perplexity,
    train_results,
    trainer_state,
)

LONGEST_CELL = 600  # characters of a sample that are shown; what is left out is counted beside it


def write_run_folder(
    folder: Path, facts: Facts, train_metrics: Mapping[str, Any], eval_metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Write train_results.json, eval_results.json, all_results.json, trainer_state.json, training_loss.png,
    training_eval_loss.png, reward.png where rewards are learned from, and report.md; each whole or not at all. Gives
    back what all_results.json holds."""
    train = train_results(facts) | dict(train_metrics)
    evaluation = eval_results(facts) | dict(eval_metrics)
    everything = {**train, **evaluation, **outcome_results(facts.outcome)}
    write_json(folder / "train_results.json", train)
    plots = {
        "training_loss.png": plot_training_loss, "training_eval_loss.png": plot_eval_loss, "reward.png": plot_reward,
    }  # fmt: skip
    for name in ("eval_results.json", *plots):  # an earlier run's would tell of another model
        (folder / name).unlink(missing_ok=True)
    if evaluation:
        write_json(folder / "eval_results.json", evaluation)
    write_json(folder / "all_results.json", everything)
    write_json(folder / "trainer_state.json", trainer_state(facts, train))
    drawn = [name for name, draw in plots.items() if draw(facts.history, folder / name)]
    write_text(folder / "report.md", page(folder.resolve().name, facts, drawn))
    return everything


# ------------------------------------------------------------ report.md


def page(name: str, facts: Facts, plots: Sequence[str]) -> str:
    """report.md of the run `name`, with the pictures `plots` (file names beside it)."""
    sections = [
        f"# {_plain(name)}\n",
        _summary(facts),
        _remarks(facts),
        _outcome(facts.outcome),
        "".join(f"![{plot.removesuffix('.png').replace('_', ' ')}]({plot})\n\n" for plot in plots).rstrip("\n"),
        _evaluations(facts),
        _data(facts.counts),
        _timing(facts),
        _config(facts.job),
        "## Versions\n\n" + _table(["library", "version"], list(facts.versions.items())) if facts.versions else "",
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections if section) + "\n"


def _summary(facts: Facts) -> str:
    history, lines = facts.history, []
    losses = [step.loss for step in history.steps if math.isfinite(step.loss)]
    tokens = sum(step.tokens for step in history.steps)
    lines.append(
        f"- {history.last_step:,} of {facts.total_steps:,} optimizer steps, "
        f"{history.steps[-1].epoch if history.steps else 0:.2f} epochs, {tokens:,} tokens, {clock_text(facts.elapsed)}"
    )
    if losses:
        edge = max(1, min(10, len(losses) // 10))
        start, end = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
        lines.append(f"- training loss {start:.4f} → {end:.4f}" + (f" (means of {edge} steps)" if edge > 1 else ""))
    rewards = [total / weight for total, weight in (s.metrics.get("reward", (0, 0)) for s in history.steps) if weight]
    if rewards:
        edge = max(1, min(10, len(rewards) // 10))
        start, end = sum(rewards[:edge]) / edge, sum(rewards[-edge:]) / edge
        lines.append(f"- reward {start:.4f} → {end:.4f}" + (f" (means of {edge} steps)" if edge > 1 else ""))
    if history.evaluations and rewards:
        first, last = (history.evaluations[i].metrics.get("reward", math.nan) for i in (0, -1))
        lines.append(f"- held-out reward {first:.4f} (step {history.evaluations[0].step}) → {last:.4f} (step "
                     f"{history.evaluations[-1].step})")  # fmt: skip
    elif history.evaluations:
        first, last, best = history.evaluations[0], history.evaluations[-1], history.best
        lines.append(
            f"- held-out loss {first.eval_loss:.4f} (step {first.step}) → {last.eval_loss:.4f} (step {last.step})"
            + (f", best {best.eval_loss:.4f} (step {best.step})" if best and best is not last else "")
        )
    lines.append(f"- the run ends with the weights of step {facts.model_step:,}")
    return "\n".join(lines)


def _remarks(facts: Facts) -> str:
    grave = [diagnosis for diagnosis in facts.diagnoses if diagnosis.level == "warning"]
    mild = [diagnosis for diagnosis in facts.diagnoses if diagnosis.level == "note"]
    warnings = [_remark(diagnosis) for diagnosis in grave] + [f"- {_plain(text)}" for text in facts.warnings]
    notes = [_remark(diagnosis) for diagnosis in mild] + [f"- {_plain(text)}" for text in facts.notes]
    parts = ["## Warnings\n\n" + ("\n".join(warnings) if warnings else "None.")]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(notes))
    return "\n\n".join(parts)


def _remark(diagnosis: Diagnosis) -> str:
    return f"- **{diagnosis.kind}**: {_plain(diagnosis.message)}"


def _outcome(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    scores = _table(["held-out score", "before", "after", "change"], [list(row) for row in _score_rows(outcome)])
    if not outcome.samples:
        return f"## Before and after\n\n{scores}"
    rows = [[_clip(str(sample.get(name, ""))) for name in _SAMPLE] for sample in outcome.samples]
    return f"## Before and after\n\n{scores}\n\n" + _table(list(_SAMPLE), rows)


def _evaluations(facts: Facts) -> str:
    evaluations = facts.history.evaluations
    if not evaluations:
        return ""
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics))
    losses = [] if "reward" in names else ["loss", *(["perplexity"] if of_likelihood(names) else [])]
    rows = []
    for evaluation in evaluations:
        loss, metrics = evaluation.eval_loss, evaluation.metrics
        row = [evaluation.step, f"{evaluation.epoch:.2f}"]
        row += [f"{loss:.4f}", score(perplexity(loss))][: len(losses)]
        rows.append(row + [score(metrics.get(name)) for name in names])
    return "## Evaluations\n\n" + _table(["step", "epoch", *losses, *names], rows)


def _data(counts: DataCounts | None) -> str:
    if counts is None:
        return ""
    rows: list[list[Any]] = [
        ["rows read", f"{counts.read:,}"],
        ["rows trained on", f"{counts.used:,}"],
        *([f"refused: {reason}", f"{rows:,}"] for reason, rows in sorted(counts.refused.items(), key=lambda x: -x[1])),
        ["rows truncated", f"{counts.truncated:,}"],
        ["tokens in an epoch", f"{counts.tokens:,}"],
        ["of them trained on", f"{counts.labelled:,} ({counts.labelled / max(1, counts.tokens):.1%})"],
        ["rows held out", f"{counts.eval_rows:,}"],
    ]
    return "## Data\n\n" + _table(["", "count"], rows)


def _timing(facts: Facts) -> str:
    results = train_results(facts)
    inside = results["train_steps_seconds"]
    rows = [
        ["whole run", clock_text(facts.elapsed)],
        ["in training steps", clock_text(inside)],
        ["evaluating, saving and the rest", clock_text(facts.elapsed - inside)],
        ["real tokens per second of training", human(results["tokens_per_second"])],
    ]
    if facts.mfu is not None:
        rows.append(["model FLOPs utilisation (MFU)", f"{facts.mfu:.1%}"])
    return "## Time\n\n" + _table(["", "value"], rows)


def _config(job: Mapping[str, Any]) -> str:
    if not job:
        return ""
    text = yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return f"## Configuration\n\n```yaml\n{text}```"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(str(value)) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table's cell too."""
    text = re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w)|^#)", r"\\\1", text, flags=re.MULTILINE)
    return text.replace("\r", "").replace("\n", "<br>")


# ------------------------------------------------------------ before and after

_SAMPLE = ("prompt", "label", "before", "after")


def comparison_tables(outcome: Outcome) -> list[Table]:
    """The scores, and the samples side by side, for the terminal."""
    scores = Table(title="Held-out score, before and after", title_justify="left")
    scores.add_column("")
    for name in ("before", "after", "change"):
        scores.add_column(name, justify="right")
    for row in _score_rows(outcome):
        scores.add_row(*(Text(cell) for cell in row))
    if not outcome.samples:
        return [scores]
    samples = Table(title="Examples", title_justify="left", show_lines=True)
    for name in _SAMPLE:
        samples.add_column(name, overflow="fold", ratio=1)
    for sample in outcome.samples:
        samples.add_row(*(Text(_clip(str(sample.get(name, "")), 300)) for name in _SAMPLE))
    return [scores, samples]


def _score_rows(outcome: Outcome) -> list[tuple[str, str, str, str]]:
    rows = []
    for name in dict.fromkeys([*outcome.before, *outcome.after]):
        before, after = outcome.before.get(name), outcome.after.get(name)
        change = "" if before is None or after is None else f"{after - before:+.4g}"
        rows.append((name, score(before), score(after), change))
    return rows


def score(value: float | None) -> str:
    """A score in about four digits: 0.9125, 57.31, 1280; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def _clip(text: str, longest: int = LONGEST_CELL) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"
