"""TRL's SFTTrainer on rows that are tokens already, with labels over the answers."""

from __future__ import annotations

import tempfile

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.rivals.recorder import StepClock, arguments, finish, packs_per_step, read_tokens
from bench.rivals.trainer import job_arguments, load, settings_of


def main() -> None:
    spec, out = arguments()
    job, chosen = spec["job"], spec["settings"]["arguments"]
    given = {**job_arguments(spec, ""), "max_length": job["max_length"], **chosen}
    rows = read_tokens(spec["tokens_file"])
    if given.get("packing"):
        given["per_device_train_batch_size"] = packs_per_step(rows, job)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load(spec, spec["settings"]["dtype"]),
            args=SFTConfig(**{**given, "output_dir": folder}),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[clock],
        )
        trainer.train()
    shown = {name: getattr(trainer.args, name) for name in ("packing", "padding_free")}
    finish(out, clock.steps, settings_of(trainer) | shown)


if __name__ == "__main__":
    main()
