"""LLaMA-Factory in its own environment, by `run_exp`, on a tokenised data set (its `tokenized_path`). It computes in
what the weights are stored in unless told to use bf16, so a float32 run reads the model stored so."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from typing import Any

from datasets import Dataset, DatasetDict
from llamafactory.data.processor.processor_utils import greedy_knapsack  # type: ignore  # in its own environment
from llamafactory.train.tuner import run_exp  # type: ignore

from bench.rivals.recorder import StepClock, arguments, finish, packs_per_step, read_tokens

Rows = list[dict[str, list[int]]]


def packed(rows: Rows, length: int) -> Rows:
    """Rows as its `neat_packing` stores them: chosen by its own knapsack, numbered from 1 in the attention mask, and
    padded to one more than its cut-off. That one must be a multiple of 8: its collator pads to such, but not the
    positions. Longer rows are left out, as it does."""
    rows = [row for row in rows if len(row["input_ids"]) < length]
    by_length: dict[int, Rows] = defaultdict(list)
    for row in rows:
        by_length[len(row["input_ids"])].append(row)
    packs = []
    for lengths in greedy_knapsack([len(row["input_ids"]) for row in rows], length - 1):
        members = [by_length[length].pop() for length in lengths]
        padding = length - sum(lengths)
        packs.append(
            {
                "input_ids": [i for row in members for i in row["input_ids"]] + [0] * padding,
                "labels": [i for row in members for i in row["labels"]] + [-100] * padding,
                "position_ids": [i for length in lengths for i in range(length)] + [0] * padding,
                "attention_mask": [n for n, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding,
            }
        )
    return packs


def main() -> None:
    spec, out = arguments()
    job, lora, chosen = spec["job"], spec["lora"], spec["settings"]["arguments"]
    rows, batch_size = read_tokens(spec["tokens_file"]), job["batch_size"]
    cutoff = job["max_length"]
    if chosen.get("neat_packing"):
        batch_size, cutoff = packs_per_step(rows, job), cutoff - 1
        rows = packed(rows, job["max_length"])
    else:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    method: dict[str, Any] = {"finetuning_type": "full"}
    if not job["full"]:
        method = {
            "finetuning_type": "lora", "lora_target": "all", "lora_rank": lora["rank"], "lora_alpha": lora["alpha"],
            "adapter_name_or_path": spec["adapter"],
        }  # fmt: skip
    model = spec["model_fp32" if spec["settings"]["dtype"] == "float32" else "model"]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(f"{folder}/tokens")
        run_exp(
            {
                "model_name_or_path": model, "stage": "sft", "do_train": True, "template": "empty",
                "dataset": "asked for, and not read beside tokens", "tokenized_path": f"{folder}/tokens",
                "cutoff_len": cutoff, "disable_shuffling": True, "output_dir": f"{folder}/run",
                "num_train_epochs": 1, "max_steps": spec["steps"] or -1, "per_device_train_batch_size": batch_size,
                "gradient_accumulation_steps": 1, "learning_rate": job["lr"], "lr_scheduler_type": "constant",
                "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1, "save_strategy": "no",
                "report_to": "none", "disable_tqdm": True, "plot_loss": False, **method, **chosen,
            },
            callbacks=[clock],
        )  # fmt: skip
    finish(out, clock.steps, {**chosen, "per_device_train_batch_size": batch_size})


if __name__ == "__main__":
    main()
