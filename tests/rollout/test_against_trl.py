"""Oracle: one step of TRL's GRPOTrainer on the same model, prompts, completions and rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_runs import tiny_job
from tunery.loop import run_job
from tunery.types import Completion

LONGEST, GROUP, LR = 12, 4, 0.05
WORDS = ["alpha beta", "gamma delta epsilon", "zeta eta", "theta iota kappa lambda"]


def write_prompts(path: Path) -> Path:
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_letters(completions: list[str]) -> list[float]:
    return [max(0.0, 1 - abs(len(text) - 30) / 30) for text in completions]


def trls_step(model: Path, output: Path, **options) -> dict[str, list[list[int]]]:
    """Train one step with TRL and save the model to `output`; its completions by prompt."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: dict[str, list[list[int]]] = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            seen.setdefault(prompt[0]["content"], []).append(list(ids))
        return of_letters([completion[0]["content"] for completion in completions])

    args = trl.GRPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, report_to=[], save_strategy="no", max_steps=1, seed=7,
        per_device_train_batch_size=len(WORDS) * GROUP, num_generations=GROUP, max_completion_length=LONGEST,
        learning_rate=LR, lr_scheduler_type="constant", adam_epsilon=1.0, max_grad_norm=1e9, disable_tqdm=True,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in WORDS])
    policy = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    trainer = trl.GRPOTrainer(policy, reward, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(output))
    return seen


class Replay:
    """A generator that answers each prompt as TRL's run did."""

    def __init__(self, said: dict[tuple[int, ...], list[list[int]]], tokenizer):
        self.said, self.tokenizer = said, tokenizer

    def sync(self):
        """It has no weights."""

    def close(self):
        """It holds nothing."""

    def generate(self, requests, sampling):
        taken: dict[tuple[int, ...], int] = {}
        for request in requests:
            prompt = tuple(int(token) for token in request.ids)
            ids = self.said[prompt][taken.setdefault(prompt, 0)]
            taken[prompt] += 1
            ended = ids[-1] == self.tokenizer.eos_token_id
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield Completion(request.number, ids, text, "stop" if ended else "length")


CASES = {
    "dapo": ({}, {}),
    "grpo": ({"loss": "grpo", "scale": "batch"}, {"loss_type": "grpo", "scale_rewards": "batch"}),
    "dr_grpo with the divergence": (
        {"loss": "dr_grpo", "scale": "none", "beta": 0.5},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.5},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_step_is_trls(tmp_path, monkeypatch, name):
    mine, trls = CASES[name]
    write_prompts(tmp_path / "prompts.jsonl")
    job = tiny_job(
        tmp_path, model={"dtype": "float32"}, data={"train": str(tmp_path / "prompts.jsonl"), "eval": None},
        adapter="full", objective={"kind": "grpo", **mine},
        rewards=[{"kind": "length", "unit": "characters", "target": 30}],
        rollout={"group": GROUP, "max_new_tokens": LONGEST}, optimizer={"lr": LR, "eps": 1.0},
        schedule={"kind": "constant", "warmup": 0}, train={"batch_size": 4, "max_steps": 1, "max_grad_norm": None},
    )  # fmt: skip
    said = trls_step(tmp_path / "model", tmp_path / "trl", **trls)
    assert sorted(map(len, said.values())) == [GROUP] * 4

    from tunery.read import read_template

    tokenizer, template = read_template(job)
    from tunery.types import Message

    by_ids = {tuple(template.prompt([Message("user", text)])): ids for text, ids in said.items()}
    monkeypatch.setattr("tunery.rollout.build.HFGenerator", lambda *args, **options: Replay(by_ids, tokenizer))
    run_job(job)
    before, ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("model", "run", "trl"))
    moved = max(float((ours[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-4
    for weight in before:
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=0, atol=1e-4 * moved)
