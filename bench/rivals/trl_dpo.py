"""TRL's DPOTrainer on pairs that are tokens already. Reference log-probabilities worked out before training count:
their time is spread over the steps."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from bench.rivals.recorder import StepClock, arguments, finish, read_tokens
from bench.rivals.trainer import job_arguments, load, settings_of


class Trainer(DPOTrainer):
    """Takes the rows as they are, and says how long the reference took before training."""

    before = 0.0

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*given, **named)
        self.before = time.perf_counter() - began
        return dataset


def pair_tokens(row: dict[str, Any]) -> int:
    """Tokens of both sequences of a pair."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def main() -> None:
    spec, out = arguments()
    job, chosen = spec["job"], spec["settings"]["arguments"]
    rows = read_tokens(spec["tokens_file"])
    clock = StepClock(pair_tokens)
    with tempfile.TemporaryDirectory() as folder:
        given = {**job_arguments(spec, folder), "max_length": job["max_length"], "beta": job["beta"], **chosen}
        trainer = Trainer(
            model=load(spec, spec["settings"]["dtype"]),
            args=DPOConfig(**given),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[clock],
        )
        trainer.train()
    share = trainer.before / len(rows)
    steps = [step | {"seconds": step["seconds"] + share * job["batch_size"]} for step in clock.steps]
    finish(out, steps, settings_of(trainer) | {"precompute_ref_log_probs": trainer.precompute_ref_logps})


if __name__ == "__main__":
    main()
