"""Does preference training learn to prefer? A preference objective on real pairs, a part of them held out.

    python -m bench.preference [ROWS ...] [--models NAME ...] [--seeds 1 2 3] [key=value ...]

ROWS are files of pairs (by default the two demonstration sets beside the assets, see tests/assets_path.py). For each
model and file it prints what the held-out pairs say before and after: the loss, the share of pairs whose chosen answer
has the higher reward, and the margin between the rewards. Figures go to bench/results/preference_<objective>.json."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results_page import HERE

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
    found = [{name: one[name] for name in SHOWN if name in one} for one in held_out]
    return {
        "model": Path(model).name, "rows": rows.name, "seed": seed, "seconds": round(seconds, 1), "held_out": found,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    first, last = found["held_out"][0], found["held_out"][-1]
    moves = (f"{first[name]:6.3f} -> {last[name]:6.3f}" for name in SHOWN[:3])
    return "  ".join(
        [f"{found['model']:18}", f"{found['rows']:18}", f"{found['seed']:4}", *moves, f"{found['seconds']:6.0f} s"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="files of pairs, and overrides of the job as key=value")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="where the figures go")
    args = parser.parse_args()
    overrides = [word for word in args.words if "=" in word]
    files = [Path(word) for word in args.words if "=" not in word] or ROWS
    results = [run(m, rows, seed, overrides) for m in args.models for rows in files for seed in args.seeds]
    print(f"{'model':18}  {'rows':18}  seed  {'held-out loss':16}  {'accuracies':16}  {'margins':16}")
    print("\n".join(line(found) for found in results))
    kind = next((word.partition("=")[2] for word in overrides if word.startswith("objective=")), "dpo")
    out = args.out or HERE / "results" / f"preference_{kind}.json"
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
