"""Training speed on a CUDA device: LoRA or full fine-tuning of a random model of Llama's shape, in bfloat16, against
transformers.Trainer (with PEFT for LoRA) on the same rows.

    python -m bench.gpu [--method lora|full] [--shape 8b|3b|1b] [--rounds 3] [--minutes 9]
    python -m bench.gpu --check          our kernels against their references on this device
    python -m bench.gpu --page           write the section of bench/RESULTS.md from the results that are there

Needs torch, transformers, peft and accelerate, and what Tunery itself needs; no network and no file. On a machine
where Tunery is not installed, set PYTHONPATH=src. Every contestant runs in its own process, in turns; each measures
two kinds of rows: `dense` (4,096 tokens each) and `ragged` (Alpaca's lengths). What is measured is written to
--results as it comes, and the whole ends by itself after --minutes. The tests that need such a device:
`python -m pytest -m gpu`.

Without CUDA nothing is written; --shape tiny tries the script itself."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu_contestants import PREFIX
from bench.gpu_job import SHAPES, Spec, parameters
from bench.results_page import HERE, described, save_result, write_section

DATA = {"dense": "rows of 4,096 tokens, all trained", "ragged": "Alpaca's lengths, answers trained"}
RIVALS = {"Trainer, checkpointing": True, "Trainer, no checkpointing": False}
GRACE = 20.0  # seconds before the end at which a contestant stops taking steps


# ---------------------------------------------------------------- measuring


def contestants(variants: list[str]) -> dict[str, dict[str, Any]]:
    """name -> fields of its Spec. A variant is "name: key=value key=value", with keys of Tunery's job."""
    found: dict[str, dict[str, Any]] = {"Tunery": {"kind": "tunery"}}
    for variant in variants:
        name, _, words = variant.partition(":")
        found[f"Tunery, {name.strip()}"] = {"kind": "tunery", "overrides": words.split()}
    return found | {name: {"kind": "trainer", "checkpointing": on} for name, on in RIVALS.items()}


def measure(given: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All measurements so far, after each process that made some."""
    end = time.time() + 60 * given.minutes
    taken: dict[str, float] = {}
    found: list[dict[str, Any]] = []
    sizes: dict[str, dict[str, int]] = {}
    entries = contestants(given.variant)
    for number in range(given.rounds):
        for name, how in entries.items():
            if time.time() + taken.get(name, 60.0 if given.shape != "tiny" else 0.0) > end:
                print(f"round {number + 1}: no time left for {name}", flush=True)
                continue
            spec = Spec(
                contestant=name, method=given.method, shape=given.shape, data=given.data, seconds=given.seconds,
                warmup=given.warmup, deadline=end - GRACE, sizes=sizes.get(name, {}), **how,
            )  # fmt: skip
            began = time.time()
            for result in run(spec, end):
                found.append({"round": number, **result})
                if "size" in result:
                    sizes.setdefault(name, {})[result["data"]] = result["size"]
                print(line_of(found[-1]), flush=True)
            # later rounds know the fastest size, so they do not take longer
            taken[name] = time.time() - began
            yield found


def run(spec: Spec, end: float) -> Iterator[dict[str, Any]]:
    """The results of one contestant's process, as they come; it is killed at `end`."""
    root = HERE.parent
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.gpu_contestants", json.dumps(asdict(spec))]
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(max(0.0, end - time.time()), process.kill)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(PREFIX):
                yield json.loads(line.removeprefix(PREFIX))
        if process.wait() != 0:
            why = "stopped at the time limit" if time.time() >= end else f"failed (exit status {process.returncode})"
            print(f"{spec.contestant}: {why}", flush=True)
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def line_of(result: dict[str, Any]) -> str:
    """One measurement for the terminal."""
    head = f"round {result['round'] + 1}  {result['data']:6}  {result['contestant']:26}"
    if "error" in result:
        return f"{head}  {result['error']}"
    peak = f"{result['peak_bytes'] / 2**30:.1f} GiB" if result["peak_bytes"] else "-"
    loss = f"{result['first_loss']:.4f}" if result["first_loss"] is not None else "-"
    notes = "".join(f"\n    note: {note}" for note in result["notes"])
    return (
        f"{head}  {result['speed']:9,.0f} tokens/s  MFU {utilisation(result):.1%}  {peak}  first loss {loss}  "
        f"({result['steps']} steps; {result['setting']}){notes}"
    )


def utilisation(result: dict[str, Any], hardware: bool = False) -> float:
    """MFU of a measurement, or HFU, which counts recomputed activations as well; both over real tokens."""
    flops = result["flops_useful"] + (result["flops_recomputed"] if hardware and result["recomputes"] else 0.0)
    return result["speed"] * flops / result["peak_flops"]


# ---------------------------------------------------------------- the page


def ratios(measurements: list[dict[str, Any]], name: str) -> list[float]:
    """Tokens/s of contestant `name` over those of the best Trainer, in each round that has both."""
    found = []
    for number in sorted({m["round"] for m in measurements}):
        speeds = {m["contestant"]: m["speed"] for m in measurements if m["round"] == number and "speed" in m}
        rivals = [speeds[rival] for rival in RIVALS if rival in speeds]
        if name in speeds and rivals:
            found.append(speeds[name] / max(rivals))
    return found


def table(measurements: list[dict[str, Any]]) -> list[str]:
    """Markdown: medians over the rounds."""
    lines = [
        "| rows | contestant | tokens/s | over the best Trainer | MFU | HFU | peak memory | setting |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for data in DATA:
        here = [m for m in measurements if m["data"] == data]
        for name in dict.fromkeys(m["contestant"] for m in here):
            mine = [m for m in here if m["contestant"] == name and "speed" in m]
            if not mine:
                error = next(m["error"] for m in here if m["contestant"] == name)
                lines.append(f"| {data} | {name} | - | - | - | - | - | {error} |")
                continue
            middle = sorted(mine, key=lambda m: m["speed"])[len(mine) // 2]
            speed = statistics.median(m["speed"] for m in mine)
            over = sorted(ratios(here, name))
            ratio = f"{statistics.median(over):.2f} ({over[0]:.2f} to {over[-1]:.2f})" if over else "-"
            peak = f"{max(m['peak_bytes'] for m in mine) / 2**30:.1f} GiB" if middle["peak_bytes"] else "-"
            lines.append(
                f"| {data} | {name} | {speed:,.0f} | {ratio} | {utilisation(middle):.1%} | "
                f"{utilisation(middle, hardware=True):.1%} | {peak} | {middle['setting']} |"
            )
    return lines


def section(results: list[dict[str, Any]], checked: dict[str, Any] | None) -> str:
    """The Markdown of everything measured."""
    lines = [
        "## On a GPU",
        "",
        "`python -m bench.gpu`: random models of Llama 3's shapes in bfloat16 on random tokens, LoRA of rank 16 on all",
        "linear layers or full fine-tuning with float32 weights and AdamW, against transformers.Trainer (with PEFT,",
        "sdpa, padded batches of the fastest size) with gradient checkpointing, its usual setting, and without;",
        "rows are " + " or ".join(f"`{name}` ({what})" for name, what in DATA.items()) + ".",
        "Tokens are real ones (padding does not count); medians over rounds, each contestant in its own process, in",
        "turns. MFU counts the useful operations of `tunery/flops.py` over the data sheet's peak, HFU the recomputed",
        "ones as well.",
        "`python -m bench.gpu --check` compares the kernels with their references on the device;",
        "`python -m pytest -m gpu` runs the tests that need one.",
    ]
    for result in results:
        rounds = len({m["round"] for m in result["measurements"]})
        kinds = [data for data in DATA if any(m["data"] == data for m in result["measurements"])]
        lines += [
            "",
            f"### {'LoRA' if result['method'] == 'lora' else 'Full fine-tuning'}, Llama's {result['shape'].upper()} "
            f"shape ({result['parameters'] / 1e9:.2f}B parameters), {' and '.join(kinds)} rows",
            "",
            *table(result["measurements"]),
            "",
            f"{rounds} round{'s' if rounds > 1 else ''}. {described(result)}",
        ]
    if not results:
        lines += ["", "Speed: not measured."]
    lines += ["", "### Kernels against their references", ""]
    if checked is None:
        return "\n".join([*lines, "Not measured."])
    lines += ["| what | relative error | allowed |", "| --- | ---: | ---: |"]
    lines += [f"| {c['what']} | {c['error']:.1e} | {c['allowed']:.0e} |" for c in checked["checks"]]
    return "\n".join([*lines, "", described(checked)])


def write_page(folder: Path) -> None:
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))}
    checked = read.pop("gpu-check", None)
    order = list(SHAPES)
    results = sorted(read.values(), key=lambda r: (r["method"] != "lora", order.index(r["shape"])))
    write_section("gpu", section(results, checked))


# ---------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: 8b for lora, 3b for full")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="end by itself after this long")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured for each kind of rows")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME: KEY=VALUE ...",
                        help="one more contestant: Tunery with these keys of its job")  # fmt: skip
    parser.add_argument("--results", type=Path, help="folder for the JSON; default with CUDA: bench/results")
    parser.add_argument("--check", action="store_true", help="only compare the kernels with their references")
    parser.add_argument("--page", action="store_true", help="only write the section of bench/RESULTS.md")
    given = parser.parse_args()
    given.shape = given.shape or ("8b" if given.method == "lora" else "3b")
    if given.page:
        write_page(given.results or HERE / "results")
        return 0
    import torch

    results = given.results or (HERE / "results" if torch.cuda.is_available() else None)
    if given.check:
        from bench.gpu_check import run_checks

        checks = run_checks()
        if results is not None:
            save_result("gpu-check", {"checks": [asdict(check) for check in checks]}, results)
        return 0 if all(check.passed for check in checks) else 1
    values = {"method": given.method, "shape": given.shape, "parameters": parameters(given.shape)}
    # a lent machine may have time for one kind of rows in a sitting: each has its file then
    name = "-".join(["gpu", given.method, given.shape, *(given.data if set(given.data) != set(DATA) else [])])
    for measurements in measure(given):
        if results is not None:
            save_result(name, {**values, "measurements": measurements}, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
