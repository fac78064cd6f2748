"""Pairs or samples per second: what comes of races whose jobs are counted in them, and not in tokens alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.contestants import Contestant
from bench.jobs import Job
from bench.sft import QUIET, ROOT, race

WARMUP = 2  # steps that are not timed


def chosen(everyone: Sequence[Contestant], words: Sequence[str]) -> list[Contestant]:
    """The first (plain Tunery), and those whose names begin with one of the words. Raises ValueError for a beginning
    that nobody has."""
    for word in words:
        if not any(one.name.startswith(word) for one in everyone):
            raise ValueError(f"no rival {word!r}; there are {', '.join(one.name for one in everyone)}")
    return [everyone[0], *(one for one in everyone[1:] if any(one.name.startswith(word) for word in words))]


def per_second(run: dict[str, Any], per_step: int) -> float:
    """Of the steps after the warm-up, `per_step` each. Of a shorter run, all."""
    timed = run["steps"][WARMUP:] or run["steps"]
    return per_step * len(timed) / sum(step["seconds"] for step in timed)


def summarise(
    field_: Sequence[Contestant], runs: dict[str, Any], per_step: int, tokens_each: float
) -> list[dict[str, Any]]:
    """Figures of each contestant; `ratios`: the first one's (Tunery's) speed over its, round by round."""
    lines = []
    first = [per_second(run, per_step) if "error" not in run else None for run in runs[field_[0].name]]
    for one in field_:
        line: dict[str, Any] = {"name": one.name, "about": one.about, "precision": one.precision}
        good = [run for run in runs[one.name] if "error" not in run]
        if not good:
            lines.append(line | {"error": runs[one.name][0]["error"]})
            continue
        speeds = [per_second(run, per_step) if "error" not in run else None for run in runs[one.name]]
        middle = median(speed for speed in speeds if speed is not None)
        losses = [step["loss"] for step in good[0]["steps"]]
        lines.append(line | {
            "per_second": middle, "tokens_per_second": middle * tokens_each, "rounds": speeds,
            "ratios": [a / b for a, b in zip(first, speeds, strict=False) if a is not None and b is not None],
            "peak_bytes": median(run["peak_bytes"] for run in good), "losses": losses,
            "settings": good[0]["settings"], "load": max(run["load"] for run in good),
        })  # fmt: skip
    return lines


def table(lines: Sequence[dict[str, Any]], unit: str) -> list[str]:
    """Lines of Markdown."""
    made = [
        f"| contestant | settings | {unit}/s | tokens/s | Tunery is | peak memory | loss, first to last | load before "
        "|",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for one in lines:
        if "error" in one:
            why = one["error"].replace("|", "/")
            made.append(f"| {one['name']} | {one['about']} | did not run: {why} | | | | | |")
            continue
        made.append(
            f"| {one['name']} | {one['about']} | {one['per_second']:.2f} | {one['tokens_per_second']:,.0f} | "
            f"{spread(one['ratios'])} | {one['peak_bytes'] / 2**30:.2f} GiB | {one['losses'][0]:.4f} to "
            f"{one['losses'][-1]:.4f} | {one['load']:.1f} |"
        )
    return made


def spread(ratios: Sequence[float]) -> str:
    """The median, and of several rounds the lowest and the highest."""
    if not ratios:
        return ""
    whole = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f} x{whole}"


# ---------------------------------------------------------------- from the command to the page


def options(about: str, steps: int, a_step: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What can be said on the command line, of `steps` steps, `a_step` each."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", nargs="*", default=[""], help="beginnings of contestants' names")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help=f"of {a_step} each")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 layers instead (a trial)")
    parser.add_argument("--python", default=sys.executable, help="the Python that the contestants are run with")
    parser.add_argument("--timeout", type=float, default=600, help="seconds until a run is given up")
    parser.add_argument("--assets", default=os.environ.get("TUNERY_ASSETS") or ROOT.parent / "shared" / "assets")
    return parser.parse_args(arguments)


def hold(
    name: str,
    title: str,
    job: Job,
    given: argparse.Namespace,
    everyone: Sequence[Contestant],
    prepare: Callable[[Job, Path, Path], Any],
    summarise: Callable[[Any, Sequence[Contestant], dict[str, Any]], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """A race of those of `everyone` that are `given`: held, printed and, but for a trial, written down."""
    os.environ.update(QUIET)
    from bench.results_page import described, save_result, write_section

    field_ = chosen(everyone, given.rivals)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(job, Path(given.assets), Path(folder) / "job")
        result = summarise(prepared, field_, race(prepared, field_, given))
    print(table(result))
    if not given.tiny:
        name = f"{name}_{given.precision}"
        saved = json.loads(save_result(name, result).read_text(encoding="utf-8"))
        write_section(name, f"## {title}, in {given.precision}\n\n{table(saved)}\n\n{described(saved)}")
