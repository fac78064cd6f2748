"""Does preference training learn to prefer? Preferences of people on real answers, a part of them held out.

    python -m bench.preference [ROWS ...] [key=value ...] [--models NAME ...] [--seeds 1 2 3] [--name NAME]

ROWS are files of pairs, or with objective=kto of thumbs (by default the two demonstration sets of pairs beside the
assets, see tests/assets_path.py). For each model and file it prints what the held-out rows say before and after: the
loss, the share of them that the rewards tell apart (of pairs: the chosen answer has the higher one; of thumbs: it has
the thumb's sign), and the margin between the rewards of good and bad answers. With --name the figures go to
bench/results/preference_NAME.json and a section of bench/RESULTS.md."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results_page import HERE, described, save_result, write_section

ASSETS = Path(os.environ.get("TUNERY_ASSETS") or HERE.parents[1] / "shared" / "assets")
ROWS = [ASSETS / "datasets/llamafactory" / name for name in ("dpo_en_demo.json", "dpo_zh_demo.json")]
MODELS = ["builtin:tiny", str(ASSETS / "models/TinyStories-656K")]
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def job(model: str, rows: Path, seed: int, folder: str) -> dict[str, Any]:
    """Small enough for a minute or two on two cores: long answers are cut."""
    template = {} if model.startswith("builtin") else {"template": "chatml"}
    return {
        "model": {"name": model, "dtype": "float32"},
        "data": {
            "train": str(rows),
            "eval": 0.2,
            "max_length": 512,
            "too_long": "truncate",
            "max_bad": 1.0,
            **template,
        },
        "objective": {"kind": "dpo", "beta": 0.1},
        "adapter": {"kind": "lora", "rank": 16},
        "optimizer": {"lr": 1e-4},
        "schedule": {"kind": "cosine", "warmup": 0.1},
        "train": {"epochs": 2, "batch_size": 16, "seed": seed, "log_every": 1},
        "eval": {"best": False},
        "output": f"{folder}/run",
    }


def run(model: str, rows: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What the held-out pairs say at each evaluation, and the time it took."""
    import tunery
    from tunery.job import load_job

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        tunery.train(load_job(job(model, rows, seed, folder), overrides))
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (Path(folder) / "run/trainer_log.jsonl").read_text().splitlines()]
    held_out = [{"loss": line["eval_loss"], **line} for line in lines if "eval_loss" in line]
    found = [shown(one) for one in held_out]
    return {
        "model": Path(model).name, "rows": rows.name, "seed": seed, "seconds": round(seconds, 1), "held_out": found,
    }  # fmt: skip


def shown(one: dict[str, Any]) -> dict[str, float]:
    """An evaluation's numbers; of thumbs the margin is between their means."""
    numbers = {name: one[name] for name in SHOWN if name in one}
    if "rewards/margins" not in numbers:
        numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
    return numbers


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each run, and one for the mean of each model and file."""
    lines = [
        "| model | rows | seed | held-out loss | told apart, % | margin | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, rows in dict.fromkeys((one["model"], one["rows"]) for one in results):
        runs = [one for one in results if (one["model"], one["rows"]) == (model, rows)]
        pairs = [(one["held_out"][0], one["held_out"][-1]) for one in runs]
        for one, (first, last) in zip(runs, pairs, strict=True):
            lines.append(_row(model, rows, str(one["seed"]), [(first, last)], f"{one['seconds']:.0f}"))
        lines.append(_row(model, rows, "mean", pairs, ""))
    return "\n".join(lines)


def _row(model: str, rows: str, seed: str, pairs: list[tuple[dict[str, float], dict[str, float]]], seconds: str) -> str:
    """Before any training all rewards are 0: no pair is told apart, and of thumbs those that are down."""

    def move(name: str, scale: float = 1.0, digits: int = 3) -> str:
        first, last = (scale * sum(pair[i][name] for pair in pairs) / len(pairs) for i in (0, 1))
        return f"{first:.{digits}f} to {last:.{digits}f}"

    apart = move("rewards/accuracies", 100, 1)
    return f"| {model} | {rows} | {seed} | {move('loss')} | {apart} | {move('rewards/margins')} | {seconds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="files of pairs, and overrides of the job as key=value")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--name", help="keep the figures under this name")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    files = [Path(word) for word in args.words if "=" not in word] or ROWS
    results = [run(m, rows, seed, overrides) for m in args.models for rows in files for seed in args.seeds]
    print(table(results))
    if args.name:
        saved = json.loads(save_result(f"preference_{args.name}", {"runs": results}).read_text(encoding="utf-8"))
        heading = f"## Preferences on real rows: {args.name}"
        write_section(f"preference_{args.name}", f"{heading}\n\n{described(saved)}\n\n{table(results)}")


if __name__ == "__main__":
    main()
