"""Plain transformers.Trainer with PEFT's LoRA and the library's padding collator."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from bench.rivals.recorder import StepClock, arguments, finish, read_tokens

SHOWN = ("bf16", "gradient_checkpointing", "per_device_train_batch_size", "train_sampling_strategy", "optim")


def job_arguments(spec: dict[str, Any], output: str) -> dict[str, Any]:
    """What the job demands of TrainingArguments, and nothing more."""
    job = spec["job"]
    return {
        "output_dir": output, "num_train_epochs": 1, "max_steps": spec["steps"] or -1,
        "per_device_train_batch_size": job["batch_size"], "gradient_accumulation_steps": 1,
        "learning_rate": job["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def load(spec: dict[str, Any], dtype: str | None) -> Any:
    """The base in `dtype` (None: what the library chooses) with the job's adapter on it."""
    chosen = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = AutoModelForCausalLM.from_pretrained(spec["model"], **chosen)
    if spec["job"]["full"]:
        return model
    return PeftModel.from_pretrained(model, spec["adapter"], is_trainable=True)


def settings_of(trainer: Any) -> dict[str, Any]:
    """What a reader wants to know of how it ran, read from the trainer itself."""
    model = trainer.model
    shown = {name: getattr(trainer.args, name) for name in SHOWN}
    weights = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return shown | {"weights": weights, "attention": model.config._attn_implementation}


def main() -> None:
    spec, out = arguments()
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=load(spec, spec["settings"]["dtype"]),
            args=TrainingArguments(**{**job_arguments(spec, folder), **spec["settings"]["arguments"]}),
            train_dataset=Dataset.from_list(read_tokens(spec["tokens_file"])),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    finish(out, clock.steps, settings_of(trainer))


if __name__ == "__main__":
    main()
