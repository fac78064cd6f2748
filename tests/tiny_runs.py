"""Small whole runs for tests: a random Llama-shaped model folder with the embedded tokenizer, and rows to train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunery.job import Job, load_job
from tunery.models.load import resolve_name

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """Conversations whose answers repeat the question's words backwards, of many lengths."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * i % 9)]
        user, answer = f"{i}: " + " ".join(words), " ".join(reversed(words))
        rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(path: Path, count: int, start: int = 0) -> Path:
    """Preference pairs: the chosen answers have the question's words in order, the rejected ones as they came."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i % 5)]
        answers = {"chosen": " ".join(sorted(words)) + " yes", "rejected": " ".join(words) + " no"}
        asked = [{"role": "user", "content": f"{i}: {' '.join(words)}"}]
        turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append({"prompt": asked, **turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def model_folder(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random two-layer Llama with the embedded base's tokenizer."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    builtin = Path(resolve_name("builtin:tiny"))
    theirs = AutoConfig.from_pretrained(str(builtin))
    config = LlamaConfig(
        vocab_size=theirs.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=theirs.bos_token_id, eos_token_id=theirs.eos_token_id,
        pad_token_id=theirs.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(str(path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin / name, path / name)
    return path


def tiny_job(folder: Path, **changes: Any) -> Job:
    """A job on `folder`/model and `folder`/{train,eval}.jsonl, both made on first use; float64 unless changed.
    `changes` are whole sections, merged one level deep."""
    if not (folder / "model").is_dir():
        model_folder(folder / "model")
        write_rows(folder / "train.jsonl", 24)
        write_rows(folder / "eval.jsonl", 6, start=1000)
    values: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "dtype": "float64"},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "cache": False},
        "adapter": {"kind": "lora", "rank": 4},
        "optimizer": {"lr": 1e-2},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 1, "seed": 5},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and isinstance(values.get(key), dict) and "kind" not in value
        values[key] = {**values[key], **value} if merged else value
    return load_job(values)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    """What a run left behind, by name."""
    name = "adapter_model.safetensors" if (output / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(output / name)


def same(a: Path, b: Path) -> bool:
    """Whether two runs left the same weights, bit for bit."""
    x, y = final_weights(a), final_weights(b)
    assert x, f"no weights in {a}"
    return x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


def losses(output: str | Path) -> list[float]:
    """The loss of every step of a run."""
    lines = [json.loads(line) for line in (Path(output) / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
