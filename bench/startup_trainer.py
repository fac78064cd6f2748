"""The usual script, for bench.startup: LoRA with transformers.Trainer and PEFT on chat rows, until the first step.

    python -m bench.startup_trainer MODEL ROWS OUTPUT

Appends a line to OUTPUT/steps.jsonl after each optimizer step, as Tunery does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def main(name: str, rows: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(row):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with Path(output, "steps.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")

    dataset = load_dataset("json", data_files=rows, split="train")
    dataset = dataset.map(encode, remove_columns=dataset.column_names)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    Path(output).mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=output, per_device_train_batch_size=16, max_steps=1000, learning_rate=5e-3, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    Trainer(model, arguments, collator, train_dataset=dataset, callbacks=[Steps()]).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
