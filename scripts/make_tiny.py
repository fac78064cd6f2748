"""Makes `builtin:tiny` from nothing: its documents, its tokenizer, its pretraining by Tunery itself.

    python scripts/make_tiny.py                                             # all of it, into src/tunery/assets/tiny
    python scripts/make_tiny.py --share 0.02 --out runs/tiny_look  # a quick look

All data come from the seeded grammar in `tunery.assets`; no other text is used, and what is held out for the
quickstart's evaluation never occurs in it (`world.held_out`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tunery.assets import TINY, rendering, world
from tunery.assets.corpus import END_OF_DOCUMENT, documents
from tunery.assets.lexicon import PATTERNS

VOCABULARY = 2048
SPECIAL = [END_OF_DOCUMENT, "<|im_start|>", "<|im_end|>"]
# (documents, world, schedule) of each stage: ever narrower worlds, so that the last is learned well. A document of
# about a hundred tokens is one training row, so that none sees another.
STAGES = [
    (58_112, 0, {"kind": "wsd", "warmup": 200, "decay": 0.5}),
    (31_200, 1, {"kind": "constant", "warmup": 200}),
    (26_000, 2, {"kind": "wsd", "warmup": 100, "decay": 0.5}),
    (20_000, 3, {"kind": "wsd", "warmup": 100, "decay": 0.6}),
    (14_300, 4, {"kind": "wsd", "warmup": 50, "decay": 0.8}),
    (14_300, 4, {"kind": "wsd", "warmup": 50, "decay": 0.9}),
]
WARM_UP = 1_500  # documents that practise copying, before the usual mix

# Widths that block-wise quantisation in groups of 32 or 64 divides; grouped queries; tied embeddings.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index("<|im_end|>"),
    "pad_token_id": SPECIAL.index(END_OF_DOCUMENT),
}

# Of the Qwen2 tokenizer, which loaders choose by the model type.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

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


def chinese_units(seed: int, count: int) -> Iterator[str]:
    """Slot values and the pattern text between them. Chinese has no spaces, so a BPE trained on sentences would merge
    across words, and a term would be other tokens in a sentence than alone."""
    rng = Random(seed)
    for _ in range(count):
        passage = world.sample_passage(rng)
        for sentence in passage.sentences:
            style = rendering.random_style(rng)
            yield from re.findall("[\u4e00-\u9fff]+", re.sub(r"\{.*?\}", " ", PATTERNS[sentence.pattern][1]))
            for slot, value in sentence.values:
                yield rendering.render_value(slot, value, "zh", style, passage.wording)


def _without_chinese(text: str) -> str:
    return re.sub("[\u4e00-\u9fff]+", "\n", text)


def train_tokenizer(seed: int = 0, count: int = 20_000) -> Tokenizer:
    """A byte-complete BPE on `count` documents.

    At use it normalises and splits as every tokenizer of this model type does whatever its file says: NFC, and
    numbers digit by digit. The merges are learned with whole numbers, so those few of them stay unused."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=18,  # bytes: at most six Chinese characters
        show_progress=False,
    )
    texts = itertools.islice(documents(seed), count)
    tokenizer.train_from_iterator(itertools.chain(map(_without_chinese, texts), chinese_units(seed, count)), trainer)
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def write_skeleton(folder: Path, tokenizer: Tokenizer) -> None:
    """Everything of the model but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
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


def write_initial_weights(folder: Path, seed: int) -> None:
    """Random weights that already look back: translation is copying with a dictionary, and from plain noise a model
    this small spends more than a million tokens before it discovers that looking back helps.

    So the noise is arranged (the circuit of Olsson et al., arXiv:2209.11895): in layer 0 the query and key biases
    make one head look one token back and another two, by rotary position alone, and the first writes what it sees
    into its own subspace `before`; in layer 1 the first head of each group looks for places where the token before
    equals the present one and writes what stood there. Embeddings keep out of `before` at the start. Nothing else
    differs from small normal weights and everything trains."""
    import torch
    from torch import Tensor
    from transformers import AutoConfig, AutoModelForCausalLM

    noise = torch.Generator().manual_seed(seed)

    def orthonormal(rows: int, columns: int) -> Tensor:
        tall = torch.randn(max(rows, columns), min(rows, columns), generator=noise)
        basis = torch.linalg.qr(tall)[0]
        return basis if rows >= columns else basis.T

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    h, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    d, share = h // heads, heads // groups
    speeds = CONFIG["rope_theta"] ** (-torch.arange(0, d, 2) / d)  # of the d/2 rotary pairs (i, i + d/2)
    fast = [i for i in range(d // 2) if speeds[i] > 0.15]  # these tell neighbours apart
    slow = [i for i in range(d // 2) if speeds[i] < 0.012]  # these hardly turn, so they can compare content
    slow += [i + d // 2 for i in slow]
    basis = orthonormal(h, h)
    before, seen = basis[:, :d], basis[:, d : 2 * d].T  # where the previous token is written; how it is read
    outside = torch.eye(h) - before @ before.T
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.08, generator=noise)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ outside)
        for n, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj):
                part.weight.normal_(0, 0.03, generator=noise)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                part.bias.zero_()
            for group in range(groups):
                value = orthonormal(d, h)
                attention.v_proj.weight[group * d : (group + 1) * d] = 0.5 * value
                for head in range(group * share, (group + 1) * share):
                    out = value.T if n else outside @ orthonormal(h, d)
                    attention.o_proj.weight[:, head * d : (head + 1) * d] = 0.03 * out
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                part.weight.normal_(0, 0.03, generator=noise)
            layer.mlp.down_proj.weight.normal_(0, 0.01, generator=noise)

        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[: 2 * d] *= 0.2
        attention.k_proj.weight[:d] *= 0.2
        attention.k_proj.bias[:d][fast] = 6.0
        for head in (0, 1):
            for i in fast:  # the key's bias turned back by head + 1 positions, where the score then peaks
                attention.q_proj.bias[head * d + i] = 6.0 * torch.cos(speeds[i] * (head + 1))
                attention.q_proj.bias[head * d + i + d // 2] = -6.0 * torch.sin(speeds[i] * (head + 1))
        attention.v_proj.weight[:d] = seen
        attention.o_proj.weight[:, :d] = 0.16 * before

        attention = model.model.layers[1].self_attn
        for group in range(groups):
            head = group * share
            part = slice(group * len(slow), (group + 1) * len(slow))  # each group compares by other directions
            attention.q_proj.weight[head * d : (head + 1) * d] = 0
            attention.k_proj.weight[group * d : (group + 1) * d] = 0
            attention.q_proj.weight[[head * d + i for i in slow]] = 4.0 * seen[part]
            attention.k_proj.weight[[group * d + i for i in slow]] = 4.0 * before[:, part].T
            what = basis[:, (2 + group) * d : (3 + group) * d].T
            attention.v_proj.weight[group * d : (group + 1) * d] = what
            attention.o_proj.weight[:, head * d : (head + 1) * d] = what.T
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


def write_weights(weights: Path, folder: Path) -> None:
    """The trained weights in bfloat16, without the tied head."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in load_file(weights).items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pretrain(start: Path, data: Path, output: Path, lr: float, schedule: dict[str, Any], seed: int) -> Path:
    """Pretrains the model in `start` through Tunery itself and returns the folder of the trained one."""
    import tunery

    tunery.train(
        {
            "model": str(start),
            "data": {"train": str(data), "max_length": 1024},
            "objective": {"kind": "pretrain", "append_eos": False},
            "adapter": "full",
            "optimizer": {"kind": "adamw", "lr": lr, "betas": [0.9, 0.98], "weight_decay": 0.05},
            "schedule": schedule,
            "train": {
                "epochs": 1,
                "batch_size": 13,
                "shuffle": False,  # the documents come in the order they are meant to be read
                "save_every": 400,
                "log_every": 25,
                "seed": seed,
            },
            "output": str(output),
        }
    )
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the documents of each stage, for a quick look")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="documents that practise copying first")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=TINY)
    parser.add_argument("--work", type=Path, default=Path("runs/make_tiny"), help="data, run folders, skeleton")
    args = parser.parse_args()

    folder = args.work / "skeleton"
    tokenizer = train_tokenizer()
    write_skeleton(folder, tokenizer)
    write_initial_weights(folder, args.seed)
    for stage, (count, level, schedule) in enumerate(STAGES, start=1):
        output = args.work / f"stage{stage}"
        if (output / "model.safetensors").is_file():  # done already
            folder = output
            continue
        data = args.work / f"stage{stage}.jsonl"
        stream = documents(args.seed + stage - 1, args.warm_up if stage == 1 else 0, level)
        with data.open("w", encoding="utf-8") as file:
            for text in itertools.islice(stream, int(args.share * count)):
                file.write(json.dumps({"text": text + END_OF_DOCUMENT}, ensure_ascii=False) + "\n")
        folder = pretrain(folder, data, output, args.lr, schedule, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_skeleton(args.out, tokenizer)
    write_weights(folder / "model.safetensors", args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
