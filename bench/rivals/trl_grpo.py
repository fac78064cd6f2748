"""TRL's GRPOTrainer, with transformers' generation, on the same prompts and with the same reward."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from bench.rivals.recorder import StepClock, arguments, finish
from bench.rivals.trainer import job_arguments, load, settings_of


def main() -> None:
    spec, out = arguments()
    job = spec["job"]
    rows = [json.loads(line) for line in Path(spec["rows_file"]).read_text(encoding="utf-8").splitlines()]
    wanted = job["wanted"]

    def length(completions: list[Any], **_: Any) -> list[float]:
        """1 at `wanted` characters, falling to 0 at none and at twice as much."""
        return [max(0.0, 1 - abs(len(completion[0]["content"]) - wanted) / wanted) for completion in completions]

    clock = StepClock(lambda row: 1)
    with tempfile.TemporaryDirectory() as folder:
        given = {
            **job_arguments(spec, folder), "per_device_train_batch_size": job["batch_size"] * job["group"],
            "num_generations": job["group"], "max_completion_length": job["longest"], "shuffle_dataset": False,
            **spec["settings"]["arguments"],
        }  # fmt: skip
        trainer = GRPOTrainer(
            model=load(spec, spec["settings"]["dtype"]),
            reward_funcs=length,
            args=GRPOConfig(**given),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[clock],
        )
        trainer.train()
    finish(out, clock.steps, settings_of(trainer))


if __name__ == "__main__":
    main()
