"""Tiny random models of the causal families, and random sequences, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tunery.models.load import hook_attention
from tunery.types import Tokens

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 8}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": 5}),
    "gemma2": ("Gemma2Config", {**SHAPE, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3Config", SHAPE),
    "gpt2": ("GPT2Config", {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "cohere": ("CohereConfig", SHAPE),
    "granite": ("GraniteConfig", {**SHAPE, "logits_scaling": 3.0}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SHAPE, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "bloom": ("BloomConfig", {**OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "afmoe": ("AfmoeConfig", {**SHAPE, **EXPERTS, "head_dim": 8}),
    "doge": ("DogeConfig", SHAPE),
    "falcon": ("FalconConfig", {**OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float64, hook: bool = True, **changes: Any) -> Any:
    """A model with seeded random weights, the same for the same arguments; with our attention hook where it fits."""
    import transformers

    transformers.logging.set_verbosity_error()
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**options, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if hook:
        hook_attention(model)
    return model


def tiny_scorer(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """One with a scalar head, as transformers makes it."""
    import transformers

    transformers.logging.set_verbosity_error()
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**options, "num_labels": 1, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    hook_attention(model)
    return model


def random_sequences(lengths: tuple[int, ...] = (9, 17, 5, 12), seed: int = 0, vocabulary: int = 131) -> list[Tokens]:
    """Random ids with random weights, some 0, some fractional."""
    random = np.random.default_rng(seed)
    return [
        Tokens(
            random.integers(3, vocabulary, n).astype(np.int32),
            (random.random(n) * (random.random(n) < 0.6)).astype(np.float32),
        )
        for n in lengths
    ]


def reference_loss(model: Any, sequences: list[Tokens]) -> torch.Tensor:
    """The weighted sum of -log p, one sequence at a time through the model's own forward, by the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in sequences:
        ids = torch.from_numpy(tokens.ids.astype(np.int64))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        nll = -logps.gather(1, ids[1:, None])[:, 0]
        total = total + (nll * torch.from_numpy(tokens.weights[1:])).sum()
    return total
