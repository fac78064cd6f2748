"""Oracle: transformers.Trainer, padded batches and all, on the same rows in the same order: the same loss at each
step, within 1e-3 in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from assets_path import assets
from tunery.engine import Engine
from tunery.job import load_job
from tunery.loop import run_job
from tunery.read import read_data
from tunery.resolve import resolve
from tunery.setup import load_start

pytestmark = pytest.mark.slow

JOBS = {
    "TinyStories-656K, LoRA, Dolly": ("TinyStories-656K", {"kind": "lora", "rank": 8}, "dolly", 1e-3),
    "stories260K, full, Dolly": ("stories260K", "full", "dolly", 5e-4),
    "stories260K, LoRA, tool calls": ("stories260K", {"kind": "lora", "rank": 8}, "glaive", 1e-3),
}


def make_job(folder: Path, name: str):
    model, adapter, data, lr = JOBS[name]
    root = assets()
    source = {"path": str(root / "datasets/dolly/databricks-dolly-15k.jsonl"), "format": "alpaca",
              "columns": {"prompt": "instruction", "query": "context", "response": "response"}}  # fmt: skip
    dataset_dir = None
    if data == "glaive":
        source, dataset_dir = {"path": "glaive_toolcall_en_demo"}, str(root / "datasets/llamafactory")
    return load_job({
        "model": {"name": str(root / "models" / model), "dtype": "float32"},
        "data": {"train": [{**source, "samples": 48}], "dataset_dir": dataset_dir, "template": "chatml",
                 "max_length": 512, "too_long": "truncate", "cache": False},
        "adapter": adapter, "optimizer": {"lr": lr}, "schedule": {"kind": "constant", "warmup": 0},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 1, "seed": 3}, "output": str(folder / "run"),
    })  # fmt: skip


def trainer_losses(job, folder: Path) -> list[float]:
    """The same job as anyone would write it with the library: its collator's padding, labels of -100, its own loss."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from tunery.data.loader import Cut, Loader

    engine = Engine(job.model.dtype)
    job = resolve(job, engine)
    data = read_data(job).data
    loader = Loader(data.train, batch_size=8, seed=3, shuffle=True, how=Cut(512))
    order = [row for step in range(2 * loader.steps_per_epoch) for row in loader.rows(step)]
    from tunery.config import build

    model, _ = load_start(job, build("adapters", job.adapter), None, engine)
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("sdpa")

    rows = []
    for row in order:
        (tokens,) = data.train.sequences(row)
        rows.append({"ids": tokens.ids.astype(np.int64), "labels": np.where(tokens.weights > 0, tokens.ids, -100)})

    def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(r["ids"]) for r in batch)
        full = lambda key, value: torch.tensor(  # noqa: E731
            np.stack([np.pad(r[key], (0, width - len(r[key])), constant_values=value) for r in batch]).astype(np.int64)
        )
        mask = torch.tensor([[1] * len(r["ids"]) + [0] * (width - len(r["ids"])) for r in batch])
        return {"input_ids": full("ids", 0), "labels": full("labels", -100), "attention_mask": mask}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_train_epochs=1, learning_rate=job.optimizer.lr, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, seed=3,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=pad)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", JOBS)
def test_the_loss_curve_is_the_trainers(name, tmp_path):
    job = make_job(tmp_path, name)
    run_job(job)
    lines = [json.loads(line) for line in (Path(job.output) / "trainer_log.jsonl").read_text().splitlines()]
    mine = [line["loss"] for line in lines if "loss" in line]
    theirs = trainer_losses(job, tmp_path)
    assert len(mine) == len(theirs) >= 8 and mine[-1] < mine[0]
    assert np.abs(np.subtract(mine, theirs)).max() < 1e-3
