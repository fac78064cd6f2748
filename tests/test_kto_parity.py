"""Oracle: TRL's KTOTrainer, padded batches and all, on the same model and rows in the same order: the same z, loss and
gradient norm, and the same weights after each optimizer step, within 1e-4 in float32.

TRL takes z from each padded batch, where it gives every prompt the answer of the row before, the first that of the last
one. We do the same over the whole step. So z is defined alike where TRL's batch is the step, without accumulation, and
that is what is compared; with accumulation TRL's z is one of a part of the step, and depends on how it is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_dpo_parity import prompt_and_answer, started
from test_reference import first_adapter
from tiny_runs import WORDS, tiny_job
from tunery.data.loader import Cut, Loader
from tunery.engine import Engine
from tunery.job import Job
from tunery.loop import run_job
from tunery.models.load import load_tokenizer
from tunery.read import read_data
from tunery.resolve import resolve

pytestmark = pytest.mark.slow

STEPS, ROWS = 3, 8  # the reference is the start, so z is 0 in the first step and not later


def write_thumbs(path: Path, count: int) -> Path:
    """Two answers in three are wanted, which makes every answer likelier, those to other prompts too: z is above 0."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * i % 9)]
        turns = [{"role": "user", "content": f"{i}: " + " ".join(words)}]
        turns.append({"role": "assistant", "content": " ".join(reversed(words))})
        rows.append({"messages": turns, "label": i % 3 != 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained_by_trl(job: Job, folder: Path, loss: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Its log, and what trained."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    engine = Engine(job.model.dtype)
    job = resolve(job, engine)
    store = read_data(job).data.train
    loader = Loader(store, batch_size=ROWS, seed=job.train.seed, shuffle=True, how=Cut(512))
    rows = []
    for step in range(STEPS):
        found = [store.sequences(number) for number in loader.rows(step)]
        answers = [prompt_and_answer(tokens) for (tokens,) in found]
        for (tokens,), (prompt, answer), other in zip(found, answers, [answers[-1], *answers[:-1]], strict=True):
            ids = {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other[1]}
            rows.append({"prompt": "", "completion": "", "label": bool(tokens.extra["label"]), **ids})

    class Tokenised(trl.KTOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_more):
            return dataset

    whole, model = job.adapter.kind == "full", started(job, engine)
    arguments = trl.KTOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=ROWS, max_steps=STEPS,
        learning_rate=job.optimizer.lr, adam_epsilon=job.optimizer.eps, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        seed=3, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8, loss_type=loss, bf16=False,
        gradient_checkpointing=False, max_length=None, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Tokenised(
        model=model, ref_model=started(job, engine) if whole else None, args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(job.model),
    )  # fmt: skip
    trainer.train()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and ".ref." not in n}
    return trainer.state.log_history, weights


@pytest.mark.parametrize("loss", ["kto", "apo_zero"])
@pytest.mark.parametrize("case", ["lora", "full", "lora trained before"])
def test_steps_are_those_of_trl(tmp_path, case, loss):
    model = {"dtype": "float32"}
    if case == "lora trained before":
        model["init_from"] = first_adapter(tmp_path)
    job = tiny_job(
        tmp_path, model=model, adapter=case.split()[0], output=str(tmp_path / "run"),
        data={"train": str(write_thumbs(tmp_path / "thumbs.jsonl", 24)), "eval": None},
        objective={"kind": "kto", "loss": loss, "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        optimizer={"lr": 1e-2, "eps": 1e-3}, schedule={"kind": "constant", "warmup": 0}, eval={"best": False},
        train={"max_steps": STEPS, "batch_size": ROWS, "micro_tokens": 100},
    )  # fmt: skip
    run_job(job)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    mine = [line for line in lines if "loss" in line]
    log, weights = trained_by_trl(job, tmp_path, {"apo_zero": "apo_zero_unpaired"}.get(loss, loss))
    theirs = [line for line in log if "loss" in line]
    for ours, other in zip(mine, theirs, strict=True):
        names = ["loss", *(f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected"))]
        for name in [*names, "kl"] if loss == "kto" else names:
            assert ours[name] == pytest.approx(float(other[name]), rel=1e-4, abs=2e-4), name
        assert ours["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-3)
    assert loss != "kto" or mine[-1]["kl"] > 0.05
    (file,) = [p for p in (tmp_path / "run").iterdir() if p.suffix == ".safetensors"]
    saved, begun = load_file(file), started(job, Engine(job.model.dtype)).state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name.replace(".default", "")], weight, rtol=0, atol=1e-4)
    assert max(float((weight - begun[name]).abs().max()) for name, weight in weights.items()) > 1e-2
