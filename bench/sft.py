"""The same fine-tuning job in Tunery and in other trainers: tokens per second, peak memory, loss, MFU.

    python -m bench.sft --job A|B|C|D|E|all [--rivals trl trainer] [--rounds 3] [--precision bf16|fp32]
                        [--python PYTHON] [--llamafactory PYTHON] [--assets FOLDER]
    python -m bench.sft --ablate [--rounds 3] [--precision bf16|fp32]

Each contestant trains in a process of its own, in turns, `--rounds` times; all with two threads that do not spin.
docs/benchmarks.md says what is measured and how. Writes bench/results/sft_JOB[_PRECISION].json and the section `sft` of
bench/RESULTS.md; a trial (--tiny or --steps) is printed only."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contestants import Contestant, ablation, chosen

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
# Idle OpenMP threads must not spin: with another process about, they would take its core.
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def race(prepared: Any, contestants: Sequence[Contestant], options: argparse.Namespace) -> dict[str, Any]:
    """Every contestant once a round, the first one of a round another each time. Name -> its runs, each what its
    process wrote down or {"error": why it has nothing}."""
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contestants}
    for number in range(options.rounds):
        start = number % len(contestants)
        for one in [*contestants[start:], *contestants[:start]]:
            if runs[one.name] and "error" in runs[one.name][0]:
                continue  # it does not run here
            outcome = run_one(prepared, one, options)
            runs[one.name].append(outcome)
            print(f"  round {number + 1}  {one.name:24} {brief(outcome)}", flush=True)
    return runs


def run_one(prepared: Any, one: Contestant, options: argparse.Namespace) -> dict[str, Any]:
    """Train once in a new process."""
    python = options.llamafactory if one.runner == "llamafactory" else options.python
    if python is None:
        return {"error": "not installed beside the others; give --llamafactory a Python that has it"}
    settings = {**one.settings, "precision": one.precision}
    with tempfile.TemporaryDirectory() as folder:
        spec, out = Path(folder, "spec.json"), Path(folder, "out.json")
        spec.write_text(json.dumps({**prepared.spec(), "settings": settings, "steps": options.steps}))
        caches = {"TUNERY_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
        command = [str(python), "-m", f"bench.rivals.{one.runner}", str(spec), str(out)]
        load = os.getloadavg()[0]
        try:
            done = subprocess.run(
                command, cwd=folder, env={**os.environ, **QUIET, **caches, "PYTHONPATH": str(ROOT)},
                capture_output=True, text=True, timeout=options.timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {options.timeout} s"}
        if done.returncode or not out.is_file():
            return {"error": last_line(done.stderr), "output": done.stderr[-4000:]}
        return {**json.loads(out.read_text()), "load": round(load, 2)}


def last_line(text: str) -> str:
    """What a failed process said last: its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "ended without a word"


def brief(outcome: dict[str, Any]) -> str:
    """One line of a run, while others go on."""
    from bench.summary import speed

    if "error" in outcome:
        return outcome["error"]
    steps = outcome["steps"]
    return (f"{speed(steps):8,.0f} tokens/s  {outcome['peak_bytes'] / 2**30:5.2f} GiB  loss {steps[0]['loss']:.4f} to "
            f"{steps[-1]['loss']:.4f}")  # fmt: skip


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One job, or the ablation of job A: prepared, raced and put together."""
    from bench.jobs import JOBS, prepare, tiny
    from bench.summary import summarise

    job = JOBS["A" if options.ablate else name]
    job = tiny(job) if options.tiny else job
    field = (
        ablation(options.precision or "bf16") if options.ablate else chosen(job.full, options.rivals, options.precision)
    )
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(job, Path(options.assets), Path(folder) / "job")
        print(f"job {name}: {job.title}; {sum(prepared.lengths):,} tokens in {len(prepared.lengths)} rows", flush=True)
        return summarise(prepared, field, race(prepared, field, options), options.steps)


def result_name(name: str, options: argparse.Namespace) -> str:
    """A race in one precision has a file of its own: machines differ in which of them they are fast in."""
    return "_".join(filter(None, ["sft", name, options.precision]))


def command(arguments: Sequence[str]) -> str:
    from bench.results_page import without_paths

    return shlex.join(["python", "-m", "bench.sft", *without_paths(arguments)])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=[*"ABCDE", "all"], default="A")
    parser.add_argument("--ablate", action="store_true", help="job A with one technique after the other switched off")
    parser.add_argument(
        "--rivals",
        nargs="*",
        default=["all"],
        help="beginnings of their names (see docs/benchmarks.md); none: Tunery alone",
    )
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="these contestants only (of --ablate: bf16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="stop every run after so many steps (a trial)")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 layers instead (a trial)")
    parser.add_argument("--python", default=sys.executable, help="the Python that Tunery and the rivals are run with")
    parser.add_argument("--llamafactory", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until a run is given up")
    parser.add_argument("--assets", default=os.environ.get("TUNERY_ASSETS") or ROOT.parent / "shared" / "assets")
    options = parser.parse_args(arguments)
    try:
        chosen(False, options.rivals, options.precision)
    except ValueError as error:
        parser.error(f"--rivals: {error}")
    if not Path(options.assets).is_dir():
        parser.error(f"--assets: there is no folder {options.assets}; give one, or set TUNERY_ASSETS")
    return options


def main() -> None:
    options = parse()
    os.environ.update(QUIET)  # before torch is loaded to measure the machine's peak
    from bench.results_page import save_result, write_section
    from bench.summary import page, table

    names = ["ablate"] if options.ablate else list("ABCDE") if options.job == "all" else [options.job]
    for name in names:
        result = measure(name, options)
        print(table(result), flush=True)
        if not (options.tiny or options.steps):
            save_result(result_name(name, options), {**result, "command": command(sys.argv[1:])})
            write_section("sft", page(ROOT / "bench" / "results"))


if __name__ == "__main__":
    main()
