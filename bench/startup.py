"""How long until something happens: `tunery --help`, and from `tunery train X.yaml` to the end of the first optimizer
step, against the usual script with transformers.Trainer and PEFT doing the same (bench/startup_trainer.py).

    python -m bench.startup [--runs 5] [--job tiny small]

The jobs: LoRA of rank 32 on the quickstart's 1,000 rows, batch 16, float32, on the embedded model, and on a random
Qwen2 of 46.5M parameters with its tokenizer. `cold`: the files of Python, its packages and the model are dropped from
the page cache before the run (as far as no other process has them open: run it on an idle machine), and the caches of
tokenised data are empty; `warm`: everything has been there before. Both contestants in turns, medians. A last part
says where Tunery's warm start goes."""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.results_page import HERE, described, save_result, write_section

ROOT = HERE.parent
ROWS = ROOT / "examples/data/quickstart_train.jsonl"
JOBS = {"tiny": "the embedded model", "small": "a random Qwen2 of 46.5M parameters"}
LIMIT = 300.0  # seconds that a start may take

# What Tunery does until the first step, as functions of its modules: label -> (module, name). A part's time is without
# that of the parts inside it.
PHASES = {
    "configuration": ("tunery.cli", "read_job"),
    "rows": ("tunery.loop", "read_data"),
    "device": ("tunery.loop", "Engine"),
    "model and adapter": ("tunery.setup", "load_start"),
    "fast paths": ("tunery.setup", "fuse"),
    "comparing shortcuts": ("tunery.setup", "CausalPolicy"),
    "optimizer, loader and the rest": ("tunery.loop", "set_up"),
}
IMPORTS, STEP = "imports", "first step"


# ---------------------------------------------------------------- what is started


def make_small(folder: Path) -> None:
    """A random Qwen2 of 46.5M parameters with the embedded model's tokenizer, whose ids are the first of 32,000."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tunery.models.load import ModelConfig, load_tokenizer

    tokenizer: Any = load_tokenizer(ModelConfig())
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=512, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1536, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))


def write_job(folder: Path, model: str, output: Path) -> Path:
    """The YAML file that Tunery is started with."""
    job = {
        "model": {"name": model, "dtype": "float32"}, "data": {"train": str(ROWS)},
        "adapter": {"kind": "lora", "rank": 32, "alpha": 64}, "optimizer": {"lr": 5e-3},
        "train": {"max_steps": 1000, "batch_size": 16}, "output": str(output),
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def environment(cache: Path) -> dict[str, str]:
    """For both: quiet threads, no network, caches of data in `cache`."""
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TUNERY_CACHE": str(cache / "tunery"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
    }  # fmt: skip


# ---------------------------------------------------------------- timing


def until_first_step(command: list[str], steps: Path, env: dict[str, str]) -> float:
    """Seconds from starting `command` until `steps` has a line; then it is killed. Raises RuntimeError with the end of
    what it said where it ends before."""
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
        try:
            while time.perf_counter() - began < LIMIT:
                if steps.is_file() and steps.stat().st_size:
                    return time.perf_counter() - began
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"{command[2]}: ended before its first step: {said.read()[-2000:]}")
                time.sleep(0.005)
            raise RuntimeError(f"{command[2]}: no step within {LIMIT:.0f} s")
        finally:
            process.kill()
            process.wait()


def start(who: str, model: str, cache: Path, before: Callable[[], None]) -> float:
    """One start of a contestant in a folder of its own; `before` prepares the machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = folder / "run"
        job = write_job(folder, model, output)
        command = {
            "Tunery": [sys.executable, "-m", "tunery", "train", str(job)],
            "Trainer": [sys.executable, "-m", "bench.startup_trainer", _folder_of(model), str(ROWS), str(output)],
        }[who]
        before()
        return until_first_step(command, output / "steps.jsonl", environment(cache))


def _folder_of(model: str) -> str:
    from tunery.models.load import resolve_name

    return resolve_name(model)


def help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tunery", "--help"], cwd=ROOT, env=environment(Path("/nonexistent")),
                   stdout=subprocess.DEVNULL, check=True)  # fmt: skip
    return time.perf_counter() - began


def drop(folders: list[Path]) -> None:
    """Ask the kernel to forget the files below these folders. What a process has mapped stays."""
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measure(jobs: list[str], runs: int) -> dict[str, Any]:
    """job -> state -> contestant -> seconds of each run."""
    python = [Path(sys.prefix) / "lib", Path(os.__file__).parent, ROOT / "src"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "small" in jobs:
            make_small(folder / "small")
        for job in jobs:
            model = "builtin:tiny" if job == "tiny" else str(folder / "small")
            times: dict[str, dict[str, list[float]]] = {s: {"Tunery": [], "Trainer": []} for s in ("cold", "warm")}
            for number in range(runs):
                for state, who in ((s, w) for s in times for w in times[s]):
                    cold = state == "cold"
                    cache = folder / f"cache-{number}-{who}" if cold else folder / "cache"
                    if not cold and number == 0:
                        start(who, model, cache, lambda: None)  # fills the caches
                    before = (lambda: drop([*python, folder])) if cold else (lambda: None)
                    times[state][who].append(start(who, model, cache, before))
                    print(f"{job}, {state}: {who} {times[state][who][-1]:.2f} s", flush=True)
            found[job] = times
    return found


# ---------------------------------------------------------------- where Tunery's time goes


def breakdown() -> dict[str, Any]:
    """Of starts on the embedded model: seconds of each phase, the `first` time (no tokenised data, no kernels compiled)
    and `warm`; and of importing, by package."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def trace(run: str, *flags: str) -> subprocess.CompletedProcess[str]:
            job = write_job(folder, "builtin:tiny", folder / run)
            command = [sys.executable, *flags, "-m", "bench.startup", "--phases", str(job)]
            env = environment(folder / "cache")
            return subprocess.run(command, cwd=ROOT, text=True, check=True, env=env, capture_output=True)

        phases = {run: json.loads(trace(run).stdout.strip().splitlines()[-1]) for run in ("first", "warm")}
        return {"phases": phases, "imports": import_seconds(trace("imports", "-X", "importtime").stderr)}


def import_seconds(text: str) -> dict[str, float]:
    """Seconds spent in the modules of each top-level package, largest first, from `python -X importtime`."""
    seconds: collections.Counter[str] = collections.Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE):
        seconds[name.partition(".")[0]] += int(own)
    return {name: microseconds / 1e6 for name, microseconds in seconds.most_common()}


class Phases:
    """Times functions by standing in for them in their modules (of ours, in a process that is for this alone)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []  # of the functions being timed, what their parts took

    def watch(self, label: str, module: Any, name: str) -> None:
        """Time module.name from now on; AttributeError where there is none."""
        original = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[label] = self.seconds.get(label, 0.0) + took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(module, name, timed)


class _Stop(BaseException):
    """Ends a run after its first step, past whatever handles errors."""


class _FirstStep:
    """A run's report that ends the run when it hears of a step."""

    def __init__(self, report: Any):
        self._report = report

    def __getattr__(self, name: str) -> Any:
        return getattr(self._report, name)

    def step(self, *_: Any, **__: Any) -> None:
        raise _Stop


def phases_of(job: str) -> dict[str, float]:
    """Seconds of each part of `tunery train JOB` in this process, until its first step."""
    began = time.perf_counter()
    modules: dict[str, Any] = {module: importlib.import_module(module) for module, _ in PHASES.values()}
    imported = time.perf_counter() - began
    watch = Phases()
    for label, (module, name) in PHASES.items():
        watch.watch(label, modules[module], name)
    loop = modules["tunery.loop"]
    train = loop.train
    loop.train = lambda run, report: train(run, _FirstStep(report))
    watch.watch(STEP, loop, "train")
    with contextlib.suppress(_Stop):
        modules["tunery.cli"].train(Path(job))
    total = time.perf_counter() - began
    parts = {IMPORTS: imported, **{label: watch.seconds[label] for label in (*PHASES, STEP)}}
    return {**parts, "everything else": total - sum(parts.values())}


# ---------------------------------------------------------------- the page


def section(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "## Starting",
        "",
        f"`tunery --help`: {statistics.median(result['help']):.2f} s (median of {len(result['help'])}).",
        "",
        "From the command to the end of the first optimizer step: LoRA on 1,000 rows, batch 16, float32; the script is",
        "transformers.Trainer with PEFT. Cold: files dropped from the page cache, no cached data; warm: everything was",
        "there before. Medians, in turns.",
        "",
        "| model | caches | Tunery | Trainer script | Trainer over Tunery |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for job, states in result["starts"].items():
        for state, times in states.items():
            ours, theirs = (statistics.median(times[who]) for who in ("Tunery", "Trainer"))
            over = sorted(b / a for a, b in zip(times["Tunery"], times["Trainer"], strict=True))
            ratio = f"{statistics.median(over):.2f} ({over[0]:.2f} to {over[-1]:.2f})"
            lines.append(f"| {JOBS[job]} | {state} | {ours:.2f} s | {theirs:.2f} s | {ratio} |")
    first, warm = (result["breakdown"]["phases"][run] for run in ("first", "warm"))
    lines += [
        "",
        "Where Tunery's start on the embedded model goes, Python's own start left out: the first time on a machine",
        "(nothing tokenised, no kernels compiled), and warm.",
        "",
        "| part | first | warm |",
        "| --- | ---: | ---: |",
        *(f"| {label} | {first[label]:.2f} s | {warm[label]:.2f} s |" for label in warm),
        f"| all | {sum(first.values()):.2f} s | {sum(warm.values()):.2f} s |",
        "",
        "Importing by package, as `python -X importtime` (which makes it slower) counts it: "
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in list(result["breakdown"]["imports"].items())[:8])
        + ".",
    ]
    return "\n".join([*lines, "", described(result)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--job", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--phases", metavar="JOB", help="only where one start of this job goes, as JSON")
    given = parser.parse_args()
    if given.phases:
        print(json.dumps(phases_of(given.phases)), flush=True)
        return
    helps = [help_seconds() for _ in range(10)]
    print(f"--help: {statistics.median(helps):.2f} s", flush=True)
    found = {"help": helps, "starts": measure(given.job, given.runs), "breakdown": breakdown()}
    print(json.dumps(found["breakdown"]["phases"], indent=1), flush=True)
    path = save_result("startup", found)
    write_section("startup", section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
