"""Oracle: TRL's DPOTrainer, padded batches and all, on the same model and rows in the same order: the same loss and
the same weights after each optimizer step, within 1e-4 in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from test_reference import first_adapter, pair_job
from tunery.config import build
from tunery.data.loader import Cut, Loader
from tunery.engine import Engine
from tunery.job import Job
from tunery.loop import run_job
from tunery.models.load import load_tokenizer
from tunery.read import read_data
from tunery.resolve import resolve
from tunery.setup import load_start
from tunery.types import Tokens

pytestmark = pytest.mark.slow

STEPS = 2


def prompt_and_answer(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Without what stands after the answer's last token, which TRL would train."""
    (trained,) = np.nonzero(tokens.weights)
    ids = tokens.ids.tolist()
    return ids[: trained[0]], ids[trained[0] : trained[-1] + 1]


def started(job: Job, engine: Engine) -> torch.nn.Module:
    """The model as the job's run has it before its first step."""
    model, _ = load_start(job, build("adapters", job.adapter), None, engine)
    getattr(model, "get_base_model", lambda: model)().set_attn_implementation("sdpa")
    return model


def trained_by_trl(job: Job, folder: Path, loss: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Its log, and what trained. AdamW's epsilon is large, so that a gradient of rounding does not become a step."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    engine = Engine(job.model.dtype)
    job = resolve(job, engine)
    store = read_data(job).data.train
    loader = Loader(store, batch_size=8, seed=job.train.seed, shuffle=True, how=Cut(512))
    rows = []
    for number in [row for step in range(STEPS) for row in loader.rows(step)]:
        chosen, rejected = store.sequences(number)
        (first, answer), (_, other) = (prompt_and_answer(tokens) for tokens in (chosen, rejected))
        ids = {"prompt_ids": first, "chosen_ids": answer, "rejected_ids": other}
        rows.append({"prompt": "", "chosen": "", "rejected": "", **ids})

    class Tokenised(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_more):
            return dataset

        def _get_train_sampler(self, *_):
            return SequentialSampler(rows)

    model = started(job, engine)
    arguments = trl.DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=job.optimizer.lr, adam_epsilon=job.optimizer.eps, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        seed=3, beta=0.3, loss_type=[loss], bf16=False, gradient_checkpointing=False, max_length=None,
        pad_to_multiple_of=None,
    )  # fmt: skip
    whole = job.adapter.kind == "full"
    trainer = Tokenised(
        model=model, ref_model=started(job, engine) if whole else None, args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(job.model),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
@pytest.mark.parametrize("case", ["lora", "full", "lora trained before"])
def test_steps_are_those_of_trl(tmp_path, case, loss):
    model = {"dtype": "float32"}
    if case == "lora trained before":
        model["init_from"] = first_adapter(tmp_path)
    job = pair_job(
        tmp_path, "auto", objective={"beta": 0.3, "loss": loss}, model=model, adapter=case.split()[0],
        optimizer={"lr": 1e-2, "eps": 1e-3}, schedule={"kind": "constant", "warmup": 0}, eval={"best": False},
        train={"max_steps": STEPS}, output=str(tmp_path / "run"),
    )  # fmt: skip
    run_job(job)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    mine = [line for line in lines if "loss" in line]
    log, weights = trained_by_trl(job, tmp_path, loss)
    theirs = [line for line in log if "loss" in line]
    for ours, other in zip(mine, theirs, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
            assert ours[name] == pytest.approx(float(other[name]), rel=1e-4, abs=2e-4), name
        assert ours["rewards/accuracies"] == float(other["rewards/accuracies"])
        assert ours["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)
    (file,) = [p for p in (tmp_path / "run").iterdir() if p.suffix == ".safetensors"]
    saved = load_file(file)
    moved = 0.0
    for name, weight in weights.items():
        key = name.replace(".default", "")
        torch.testing.assert_close(saved[key], weight, rtol=0, atol=1e-4)
        moved = max(moved, float(weight.abs().max()))
    assert moved > 1e-3
