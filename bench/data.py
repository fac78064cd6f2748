"""How fast a file of rows becomes packed streams: read, parse, tokenise with the chat template, and pack; against TRL
and LLaMA-Factory, each in its own environment and process, in turns.

    python -m bench.data [--data FILE] [--tokenizer FOLDER] [--runs 3] [--workers N] [--trl PYTHON]
                         [--llamafactory PYTHON]

Needs the assets folder (TUNERY_ASSETS or ../shared/assets) unless both paths are given: the 52,002 rows of Alpaca and
Qwen2.5's tokenizer. PYTHON is the interpreter of an environment that has the trainer. Caches are off for all. Wall
seconds are those that count; on a machine that is busy with other things processor seconds are what to compare.
With no rival given only Tunery is measured; results are written where a rival was measured on the usual rows."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.data_rivals import Clock
from bench.results_page import HERE, described, save_result, write_section

RIVALS = {"trl": "TRL", "llamafactory": "LLaMA-Factory"}
PACK = 4096  # tokens of a packed stream
LONGEST = 4096  # tokens of a row: none of Alpaca's is longer


# ---------------------------------------------------------------- one run of ours


def tunery(given: dict[str, Any]) -> dict[str, Any]:
    """Rows to streams through the same doors as any run: `prepare`, and the loader's cut."""
    from tunery.config import build, validate
    from tunery.data.dataset import DataConfig, prepare
    from tunery.data.loader import Cut, Loader
    from tunery.data.store import TokenStore
    from tunery.data.template import load_template
    from tunery.job import Job
    from tunery.models.load import ModelConfig, load_tokenizer

    values = {"train": given["data"], "cache": False, "workers": given["workers"], "max_length": LONGEST}
    data = validate(DataConfig, values)
    objective = build("objectives", Job().objective)
    template = load_template("auto", load_tokenizer(ModelConfig(name=given["tokenizer"])), max_length=data.max_length)
    clock = Clock()
    prepared = prepare(data, template, objective, seed=0)
    stored = clock.read()["seconds"]
    assert isinstance(prepared.train, TokenStore)
    loader = Loader(prepared.train, batch_size=len(prepared.train), seed=0, shuffle=True, how=Cut(given["pack"]))
    step = loader.step(0)
    report = prepared.report
    return {
        "rows": report.rows, "streams": len(step.micro), "tokens": report.train.tokens, **clock.read(),
        "seconds_to_store": stored, "refused": report.reasons(),
    }  # fmt: skip


# ---------------------------------------------------------------- all of them


def run(name: str, python: str, given: dict[str, Any]) -> dict[str, Any]:
    """One run of a contestant in a process of its own. Raises RuntimeError with the end of what it said."""
    root = HERE.parent
    path = [str(root), *([str(root / "src")] if name == "tunery" else [])]
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
             "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    command = ["bench.data", "--child"] if name == "tunery" else ["bench.data_rivals", name]
    done = subprocess.run(
        [python, "-m", *command, json.dumps(given)], cwd=root, capture_output=True, text=True,
        env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {''.join(done.stderr.strip().splitlines()[-1:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def line_of(name: str, result: dict[str, Any]) -> str:
    """One run for the terminal."""
    stored = f" ({result['seconds_to_store']:.2f} s to the store)" if "seconds_to_store" in result else ""
    return (
        f"{name:13}  {result['rows']:,} rows, {result['tokens']:,} tokens, {result['streams']:,} streams in "
        f"{result['seconds']:.2f} s{stored}; {result['rows'] / result['seconds']:,.0f} rows/s; "
        f"{result['cpu_seconds']:.2f} s of processor; load {os.getloadavg()[0]:.1f}"
    )


def section(result: dict[str, Any]) -> str:
    """Markdown."""
    runs: dict[str, list[dict[str, Any]]] = result["runs"]
    rows = runs["tunery"][0]["rows"]
    lines = [
        "## Rows to packed streams",
        "",
        f"The {rows:,} rows of Alpaca from their file to streams of {PACK:,} tokens with Qwen2.5's tokenizer and chat",
        f"template, {result['workers']} processes each, caches off, imports not counted; medians of "
        f"{len(runs['tunery'])} runs in turns.",
        "",
        "| trainer | rows/s | seconds | processor seconds | tokens | streams | Tunery's speed over it |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, title in {"tunery": "Tunery", **RIVALS}.items():
        if not runs.get(name):
            lines.append(f"| {title} | not measured | | | | | |")
            continue
        seconds = statistics.median(run["seconds"] for run in runs[name])
        cpu = statistics.median(run["cpu_seconds"] for run in runs[name])
        pairs = zip(runs[name], runs["tunery"], strict=True)
        over = sorted(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
        ratio = "" if name == "tunery" else f"{statistics.median(over):.1f} ({over[0]:.1f} to {over[-1]:.1f})"
        one = runs[name][0]
        lines.append(
            f"| {title}{_version(result, name)} | {one['rows'] / seconds:,.0f} | {seconds:.1f} | {cpu:.1f} | "
            f"{one['tokens']:,} | {one['streams']:,} | {ratio} |"
        )
    refused = ", ".join(f"{count} ({why})" for why, count in runs["tunery"][0]["refused"].items())
    if refused:
        lines += ["", f"Tunery leaves rows out that hold nothing to train: {refused}."]
    return "\n".join([*lines, "", described(result)])


def _version(result: dict[str, Any], name: str) -> str:
    number = result["rivals"].get(name)
    return f" {number}" if number else ""


def version_in(python: str, package: str) -> str:
    """The version of a package in another environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    assets = Path(os.environ.get("TUNERY_ASSETS") or HERE.parents[1] / "shared" / "assets")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(assets / "datasets/alpaca/alpaca_data.json"))
    parser.add_argument("--tokenizer", default=str(assets / "tokenizers/qwen2.5"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    for name, title in RIVALS.items():
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter of an environment with {title}")
    given = parser.parse_args()
    what = {"data": given.data, "tokenizer": given.tokenizer, "pack": PACK, "workers": given.workers}
    rivals = {name: python for name in RIVALS if (python := getattr(given, name))}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("tunery", *rivals)}
    for _ in range(given.runs):
        for name, found in runs.items():
            found.append(run(name, rivals.get(name, sys.executable), what))
            print(line_of(name, found[-1]), flush=True)
    if rivals and given.data == parser.get_default("data"):
        versions = {name: version_in(python, name) for name, python in rivals.items()}
        path = save_result("data", {"workers": given.workers, "pack": PACK, "rivals": versions, "runs": runs})
        write_section("data", section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(tunery(json.loads(sys.argv[2]))), flush=True)
    else:
        main()
