"""Real models on real rows: does the held-out loss fall well below what the untrained model gives?

    python -m bench.real_input [--rows 2000] [--only WORD] [--assets FOLDER]

Needs the assets folder (TUNERY_ASSETS or ../shared/assets): two story models that know simple English only, Dolly,
and LLaMA-Factory's demo sets. Each result replaces the same job's older one in bench/results/real_input.json and in the
table of bench/REAL_INPUT.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from tunery.job import load_job
from tunery.loop import run_job
from tunery.run_folder import versions

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real_input.json"
# Cross-entropy per token of the untrained models on plain Dolly text (assets' README: 100 rows, 512-token cap).
PLAIN_DOLLY = {"stories260K": 3.962, "TinyStories-656K": 6.077}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA r=16": {"adapter": {"kind": "lora", "rank": 16}, "optimizer": {"lr": 5e-3}},
    "full": {"adapter": "full", "optimizer": {"lr": 2e-3}},
}


def data_sets(assets: Path, rows: int) -> dict[str, dict[str, Any]]:
    """name -> the `data` section and epochs."""
    dolly = {
        "path": str(assets / "datasets/dolly/databricks-dolly-15k.jsonl"),
        "format": "alpaca",
        "columns": {"prompt": "instruction", "query": "context", "response": "response"},
        "samples": rows,
    }
    common = {"template": "chatml", "max_length": 512, "too_long": "truncate", "eval": 0.1}
    demo = {**common, "dataset_dir": str(assets / "datasets/llamafactory")}
    return {
        f"Dolly, {rows} rows": {"data": {**common, "train": [dolly]}, "train": {"epochs": 3}},
        # 75 of its 91 rows are in Chinese, which TinyStories' vocabulary (it has no bytes) cannot write: refused there
        "identity": {"data": {**demo, "train": ["identity"], "max_bad": 1.0}, "train": {"epochs": 20}},
        # with 512 tokens many rows hold nothing but their tools; more than the usual share may be left out
        "glaive_toolcall_en": {
            "data": {**demo, "train": ["glaive_toolcall_en_demo"], "max_bad": 1.0},
            "train": {"epochs": 8},
        },
    }


def measure(assets: Path, rows: int, only: str) -> None:
    """Every model with every method on every data set."""
    for model in PLAIN_DOLLY:
        for data, sections in data_sets(assets, rows).items():
            for method, how in METHODS.items():
                if only.lower() not in f"{model} {data} {method}".lower():
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    job = load_job(
                        {
                            "model": {"name": str(assets / "models" / model), "dtype": "float32"},
                            **how,
                            **sections,
                            "train": {"batch_size": 16, "log_every": 10, "keep": 1, **sections["train"]},
                            "output": f"{folder}/run",
                        }
                    )
                    start = time.perf_counter()
                    metrics = run_job(job).metrics
                    log = (Path(job.output) / "trainer_log.jsonl").read_text().splitlines()
                    evals = [json.loads(line)["eval_loss"] for line in log if "eval_loss" in line]
                keep(
                    {
                        "model": model,
                        "data": data,
                        "method": method,
                        "before": evals[0],
                        "after": metrics["eval_loss"],
                        "seconds": round(time.perf_counter() - start, 1),
                    }
                )


def keep(result: dict[str, Any]) -> None:
    """Put one result in the place of the same job's older one, and write the page anew."""
    print(result, flush=True)
    names = ("model", "data", "method")
    older = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    results = [r for r in older if any(r[name] != result[name] for name in names)] + [result]
    results.sort(key=lambda r: [r[name] for name in names], reverse=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "REAL_INPUT.md").write_text(table(results))


def qwen(assets: Path) -> dict[str, Any]:
    """Ten LoRA steps in bfloat16 on a random model of Qwen2.5-0.5B's shape, with its real tokenizer and template."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = Qwen2Config(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=1e6,
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(f"{folder}/model")
        for file in (assets / "tokenizers/qwen2.5").iterdir():
            shutil.copy(file, f"{folder}/model")
        job = load_job(
            {
                "model": {"name": f"{folder}/model", "dtype": "bfloat16"},
                "data": {"train": "alpaca_en_demo", "dataset_dir": str(assets / "datasets/llamafactory")},
                "adapter": {"kind": "lora", "rank": 8},
                "train": {"max_steps": 10, "batch_size": 4, "log_every": 1},
                "output": f"{folder}/run",
            }
        )
        start = time.perf_counter()
        run_job(job)
        log = (Path(job.output) / "trainer_log.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in log]
    return {
        "model": "random, Qwen2.5-0.5B's shape and tokenizer", "data": "alpaca_en_demo, 10 steps of 4 rows",
        "method": "LoRA r=8, bfloat16", "before": losses[0], "after": losses[-1],
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# Real models on real rows",
        "",
        f"`python -m bench.real_input` on {os.cpu_count()} CPU cores ({platform.machine()}), float32 unless said; "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + ".",
        "",
        "Loss per answer token on held-out rows (10%), before training and with the best weights (of the random model:",
        "the training loss at steps 1 and 10). For comparison, the untrained models' loss on plain Dolly text is "
        + " and ".join(f"{loss} ({name})" for name, loss in PLAIN_DOLLY.items())
        + ".",
        "",
        "| model | data | method | before | after | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['model']} | {r['data']} | {r['method']} | {r['before']:.3f} | {r['after']:.3f} | {r['seconds']} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--only", default="")
    parser.add_argument("--assets", default=os.environ.get("TUNERY_ASSETS", HERE.parents[1] / "shared" / "assets"))
    options = parser.parse_args()
    measure(Path(options.assets), options.rows, options.only)
    if options.only.lower() in "qwen":
        keep(qwen(Path(options.assets)))


if __name__ == "__main__":
    main()
