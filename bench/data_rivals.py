"""Other trainers' way from a file of rows to packed token lists, each in its own environment:

    PYTHON -m bench.data_rivals trl|llamafactory '{"data": FILE, "tokenizer": FOLDER, "pack": TOKENS, "workers": N}'

Prints one JSON line. The clock runs from the file to the packed rows; imports and loading the tokenizer (for TRL: a
model of a few numbers, which its trainer wants to see) are outside of it. Their caches are off."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Clock:
    """Wall seconds, and processor seconds of this process and of those it waited for."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": _cpu() - self._cpu}


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def trl(given: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer's own preparation: conversational prompt and completion, chat template, masks, packing."""
    import datasets
    import transformers
    import trl as library

    tokenizer = transformers.AutoTokenizer.from_pretrained(given["tokenizer"])
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    clocks: list[dict[str, float]] = []

    class Timed(library.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            prepared = super()._prepare_dataset(*args, **kwargs)
            clocks.append(clock.read())
            return prepared

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        return {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        rows = datasets.load_dataset("json", data_files=given["data"], split="train", cache_dir=folder)
        count = len(rows)
        rows = rows.map(conversation, remove_columns=rows.column_names, num_proc=given["workers"])
        clocks.append(clock.read())
        arguments = library.SFTConfig(
            output_dir=folder, packing=True, max_length=given["pack"], dataset_num_proc=given["workers"], use_cpu=True,
            bf16=False, report_to=[], save_strategy="no",
        )  # fmt: skip
        trainer = Timed(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        packed: Any = trainer.train_dataset
        total = {key: sum(clock[key] for clock in clocks) for key in clocks[0]}
        return {"rows": count, "streams": len(packed), **_tokens(packed["input_ids"]), **total}


def llamafactory(given: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's loader: its aligning of rows, its template and its packing."""
    from llamafactory.data import (  # type: ignore[import-not-found]
        get_dataset,
        get_template_and_fix_tokenizer,
    )
    from llamafactory.hparams import get_train_args  # type: ignore[import-not-found]
    from llamafactory.model import load_tokenizer  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.json").symlink_to(Path(given["data"]).resolve())
        Path(folder, "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
        model, data, training, _, _ = get_train_args(
            {
                "model_name_or_path": given["tokenizer"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
                "dataset": "rows", "dataset_dir": folder, "template": "qwen", "cutoff_len": given["pack"],
                "packing": True, "preprocessing_num_workers": given["workers"], "overwrite_cache": True,
                "output_dir": f"{folder}/run", "report_to": "none", "cache_dir": f"{folder}/cache",
            }
        )  # fmt: skip
        module = load_tokenizer(model)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data)
        count = len(json.loads(Path(given["data"]).read_text(encoding="utf-8")))
        clock = Clock()
        packed = get_dataset(template, model, data, training, stage="sft", **module)["train_dataset"]
        read = clock.read()
        # a pack is filled up with padding, which is no token of a row
        padding = module["tokenizer"].pad_token_id
        real = [[token for token in ids if token != padding] for ids in packed["input_ids"]]
        return {"rows": count, "streams": len(packed), **_tokens(real), **read}


def _tokens(rows: Sequence[Sequence[int]]) -> dict[str, int]:
    return {"tokens": sum(len(row) for row in rows)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache  # read when the library is imported, below
        result = {"trl": trl, "llamafactory": llamafactory}[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
