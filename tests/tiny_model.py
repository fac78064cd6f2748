"""A random Llama of a few thousand parameters with a byte-level tokenizer, for tests of what happens around a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunery.data.template import load_template

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Each byte is a token, so every character outside ASCII takes several; <|im_end|> ends a turn, </s> a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def random_llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Weights large enough for the next token to depend on the text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.4,
            "bos_token_id": None,
            "eos_token_id": 256,
            "pad_token_id": 257,
            **options,
        }
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, **options: Any) -> Path:
    """A model folder: weights, config, tokenizer with its chat template."""
    random_llama(**options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def chat_template() -> Any:
    return load_template("auto", byte_tokenizer())
