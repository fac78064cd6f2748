"""Makes `builtin:tiny` from nothing: its documents, its tokenizer, its pretraining by Tunery itself.

    python scripts/make_tiny.py                                      # all of it, into src/tunery/assets/tiny
    python scripts/make_tiny.py --tokens 200000 --out runs/tiny_look # a quick look

All data come from the seeded grammar in `tunery.assets`; no other text is used, and what is held out for the
quickstart's evaluation never occurs in it (`world.held_out`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tunery.assets import TINY
from tunery.assets.corpus import END_OF_DOCUMENT, documents

VOCABULARY = 3072
SPECIAL = [END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>"]
BLOCK = 512  # tokens of one training row: several whole documents

# 256 wide so that block-wise quantisation (groups of 32, 64 and 256) fits; grouped queries; tied embeddings.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index("<|im_end|>"),
    "pad_token_id": SPECIAL.index(END_OF_DOCUMENT),
}

CHAT_TEMPLATE = """\
{%- set first = 0 -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = 1 -%}
{{- messages[0]['content'] + '\\n\\n' -}}
{%- endif -%}
{{- 'You may call these tools:\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{{- '</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages[first:] -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{- message['content'] or '' -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] if call['function'] else call -%}
{%- set arguments = call['arguments'] if call['arguments'] is string else (call['arguments'] | tojson) -%}
{{- '<tool_call>{"name": "' + call['name'] + '", "arguments": ' + arguments + '}</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- (message['content'] or '') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(seed: int = 0, count: int = 20_000) -> Tokenizer:
    """A byte-complete BPE on `count` documents. Digits stand alone so that numbers are copied digit by digit,
    and no normalisation takes place, so any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: at most four Chinese characters, so that terms stay whole words
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed), count), trainer)
    return tokenizer


def write_skeleton(folder: Path, tokenizer: Tokenizer) -> None:
    """Everything of the model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": END_OF_DOCUMENT,
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "do_sample": False,
        "eos_token_id": [CONFIG["eos_token_id"], CONFIG["pad_token_id"]],
        "pad_token_id": CONFIG["pad_token_id"],
    }
    for name, content in [
        ("config.json", CONFIG),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ]:
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def blocks(tokenizer: Tokenizer, seed: int, tokens: int) -> Iterator[str]:
    """Rows of whole documents, at most BLOCK tokens each, until `tokens` are out."""
    row, length, total = "", 0, 0
    stream = documents(seed)
    while total < tokens:
        texts = [next(stream) + END_OF_DOCUMENT for _ in range(256)]
        for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
            size = len(encoding.ids)
            if row and length + size > BLOCK:
                yield row
                row, length = "", 0
            row, length, total = row + text, length + size, total + size
    yield row


def write_weights(weights: Path, folder: Path) -> None:
    """The trained weights in bfloat16, under the names `LlamaForCausalLM` saves, without the tied head."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items() if k != "lm_head.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pretrain(skeleton: Path, data: Path, output: Path, lr: float, seed: int) -> Path:
    """Pretrains through Tunery itself and returns the trained weights file."""
    import tunery

    tunery.train(
        {
            "model": {"name": str(skeleton), "random_init": True},
            "data": {"train": str(data), "max_length": BLOCK},
            "objective": {"kind": "pretrain", "append_eos": False},
            "adapter": "full",
            "optimizer": {"kind": "adamw", "lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.05},
            "schedule": {"kind": "cosine", "warmup": 0.03},
            "train": {"epochs": 1, "batch_size": 8, "seed": seed},
            "output": str(output),
        }
    )
    return next(iter(sorted(output.rglob("model.safetensors"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=8e6, help="pretraining tokens")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TINY)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/make_tiny"), help="data, run folder, skeleton"
    )
    parser.add_argument("--weights", type=Path, help="package these weights instead of training")
    args = parser.parse_args()

    skeleton = args.work / "skeleton"
    tokenizer = train_tokenizer()
    write_skeleton(skeleton, tokenizer)
    weights = args.weights
    if weights is None:
        data = args.work / "pretrain.jsonl"
        with data.open("w", encoding="utf-8") as file:
            for text in blocks(tokenizer, args.seed, int(args.tokens)):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        weights = pretrain(skeleton, data, args.work / "run", args.lr, args.seed)
    shutil.copytree(skeleton, args.out, dirs_exist_ok=True)
    write_weights(weights, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
