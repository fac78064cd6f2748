"""From the runs of a race to figures and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.contestants import Contestant
from bench.jobs import Prepared, step_sums

WARMUP = 2  # steps that are not timed: threads start, memory is asked for, kernels are chosen
# Largest difference of a step's loss from Tunery's of the same precision that is the same job computed in another
# order: in bfloat16 a rounding is 0.4%, and Adam's first updates have the size of the learning rate whatever the
# gradient's, so roundings of small gradients grow into different weights.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def speed(steps: Sequence[dict[str, float]], warmup: int = WARMUP) -> float:
    """Real tokens per second of the steps after the warm-up: sum over sum. Of a shorter run, all."""
    timed = steps[warmup:] or steps
    return sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed)


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Our tokens per second over theirs, round by round: the median, the lowest and the highest. None where there is
    no round that both came through."""
    rounds = zip(ours, theirs, strict=False)
    ratios = [speed(a["steps"]) / speed(b["steps"]) for a, b in rounds if "error" not in a and "error" not in b]
    return (median(ratios), min(ratios), max(ratios)) if ratios else None


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Between the same steps of two runs. Raises ValueError where one has more steps."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def wrong_tokens(one: Contestant, steps: Sequence[dict[str, float]], prepared: Prepared, limit: int | None) -> str:
    """What is wrong with the tokens that a contestant trained on, or "": in order, each step must hold as many as we
    count; otherwise all steps together must, unless the run was cut short."""
    expected = step_sums(prepared.lengths, prepared.job.batch_size)[:limit]
    counted = [int(step["tokens"]) for step in steps]
    if one.in_order and counted != expected:
        return f"steps of {counted[:3]}... tokens where {expected[:3]}... were expected"
    if not one.in_order and limit is None and sum(counted) != sum(expected):
        return f"{sum(counted):,} tokens trained on instead of {sum(expected):,}"
    return ""


def summarise(
    prepared: Prepared, contestants: Sequence[Contestant], runs: dict[str, list[dict[str, Any]]], limit: int | None
) -> dict[str, Any]:
    """Figures of every contestant beside those of the first (Tunery, in its default precision)."""
    import torch

    from tunery.flops import peak_flops

    peaks = {"bf16": peak_flops("cpu", torch.bfloat16), "fp32": peak_flops("cpu", torch.float32)}
    first = runs[contestants[0].name]
    lines = [_line(one, runs, prepared, limit, peaks, first) for one in contestants]
    job = prepared.job
    return {
        "job": {
            "name": job.name, "title": job.title, "rows": len(prepared.lengths), "batch_size": job.batch_size,
            "max_length": job.max_length, "tokens": sum(prepared.lengths), "labelled": sum(prepared.labelled),
            "flops_per_token": prepared.flops, **prepared.facts,
        },
        "peak_flops": peaks, "rounds": max(len(some) for some in runs.values()), "contestants": lines,
        "rival_versions": {one.runner: run["versions"] for one in contestants for run in runs[one.name][:1]
                           if "versions" in run},
    }  # fmt: skip


def _line(
    one: Contestant, runs: dict[str, list[dict[str, Any]]], prepared: Prepared, limit: int | None,
    peaks: dict[str, float], first: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    mine = [run for run in runs[one.name] if "error" not in run]
    line: dict[str, Any] = {"name": one.name, "about": one.about, "precision": one.precision}
    if not mine:
        return line | {"error": runs[one.name][0]["error"]}
    speeds, steps = [speed(run["steps"]) for run in mine], mine[0]["steps"]
    losses = [step["loss"] for step in steps]
    reference = [run["steps"] for run in runs.get(f"tunery-{one.precision}", []) if "error" not in run]
    comparable = one.in_order and reference and one.name != f"tunery-{one.precision}"
    peak = peaks.get(one.precision)
    return line | {
        "settings": mine[0]["settings"],
        "tokens_per_second": median(speeds), "rounds": speeds,
        "ratio": ratio(first, runs[one.name]),
        "peak_bytes": median(run["peak_bytes"] for run in mine),
        "mfu": median(speeds) * prepared.flops / peak if peak else None,
        "losses": losses,
        "difference": largest_difference(losses, [step["loss"] for step in reference[0]]) if comparable else None,
        "load": max(run["load"] for run in mine),
        "wrong": wrong_tokens(one, steps, prepared, limit),
    }  # fmt: skip


# ------------------------------------------------------------ tables


def table(result: dict[str, Any]) -> str:
    """Markdown: a heading, a paragraph on the job, and a line for each contestant."""
    job = result["job"]
    ablation = result["contestants"][0]["name"] == "everything on"
    peaks = " and ".join(f"{flops / 1e9:,.0f} in {name}" for name, flops in result["peak_flops"].items())
    precisions = {one["precision"] for one in result["contestants"]} - {""}
    title = f"### Job {job['name']}: {job['title']}" + f", in {min(precisions)}" * (len(precisions) == 1)
    lines = [
        title + (", one technique after the other switched off" if ablation else ""),
        "",
        f"{job['rows']} rows, {job['tokens']:,} tokens ({job['labelled']:,} trained on; the longest row "
        f"{job['longest']:,}), {job['flops_per_token'] / 1e6:,.0f} MFLOP a token; the machine's best is {peaks} "
        f"GFLOP/s; {result['rounds']} rounds.",
        "",
    ]
    return "\n".join([*lines, *(_ablation(result) if ablation else _race(result))])


def _race(result: dict[str, Any]) -> list[str]:
    lines = [
        "| contestant | settings | tokens/s | Tunery is | peak memory | MFU | loss, first to last | differs by |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for one in result["contestants"]:
        if "error" in one:
            lines.append(
                f"| {one['name']} | {one['about']} | did not run: {one['error'].replace('|', '/')} | | | | | |"
            )
            continue
        cells = [
            one["name"], one["about"] + (f" (**{one['wrong']}**)" if one["wrong"] else ""),
            f"{one['tokens_per_second']:,.0f}", times(one["ratio"]), f"{one['peak_bytes'] / 2**30:.2f} GiB",
            f"{one['mfu']:.0%}" if one["mfu"] else "", f"{one['losses'][0]:.4f} to {one['losses'][-1]:.4f}",
            difference(one),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ablation(result: dict[str, Any]) -> list[str]:
    full = result["contestants"][0]
    lines = [
        "| | switched off by | tokens/s | everything on is | its share of the time saved | peak memory | differs by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in result["contestants"]:
        if "error" in one:
            lines.append(f"| {one['name']} | {one['about']} | did not run: {one['error'].replace('|', '/')} | | | | |")
            continue
        worst = largest_difference(one["losses"], full["losses"]) if "losses" in full else 0.0
        off = one is not full
        cells = [
            one["name"], f"`{one['about']}`" if off else "", f"{one['tokens_per_second']:,.0f}",
            times(one["ratio"]) if off else "",
            f"{1 - 1 / one['ratio'][0]:.0%}" if off and one["ratio"] else "",
            f"{one['peak_bytes'] / 2**30:.2f} GiB", f"{worst:.4f}" if off else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def times(numbers: Sequence[float] | None) -> str:
    """A ratio with its spread."""
    return f"{numbers[0]:.2f} x ({numbers[1]:.2f} to {numbers[2]:.2f})" if numbers else ""


def difference(one: dict[str, Any]) -> str:
    """The largest difference of a step's loss, in bold where it is more than the tolerance."""
    if one["difference"] is None:
        return ""
    text = f"{one['difference']:.4f}"
    return text if one["difference"] <= TOLERANCE[one["precision"]] else f"**{text}**"


def page(folder: Path) -> str:
    """The section of bench/RESULTS.md: every job that has a result in `folder`."""
    from bench.results_page import described

    parts = [
        "## Fine-tuning beside other trainers",
        "",
        "What the columns mean, and what is the same for all: [docs/benchmarks.md](../docs/benchmarks.md).",
    ]
    for path in sorted(folder.glob("sft_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        rivals = "; ".join(
            f"{name} with " + ", ".join(f"{package} {number}" for package, number in versions.items())
            for name, versions in result["rival_versions"].items()
            if name != "tunery"
        )
        parts += ["", table(result), "", described(result), *([f"Rivals: {rivals}."] if rivals else [])]
    return "\n".join(parts)
