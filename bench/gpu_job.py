"""The jobs of bench.gpu: models of Llama's shapes with random weights, rows of random tokens of given lengths, the same
and in the same order for every contestant, and what a token of them costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

RANK, ALPHA, LR, SEED = 16, 32, 1e-5, 0


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """Rows of a batch: `prompts` tokens that are shown and `answers` tokens that are trained, int64 [rows] each;
    `batch_size` rows a step."""

    prompts: np.ndarray
    answers: np.ndarray
    batch_size: int

    @property
    def lengths(self) -> np.ndarray:
        return self.prompts + self.answers

    @property
    def labelled(self) -> float:
        """Share of the tokens that are trained targets; the first of a row has nothing before it."""
        return float((self.answers - (self.prompts == 0)).sum() / self.lengths.sum())

    @property
    def mean_length(self) -> float:
        """Length averaged over tokens: sum of squares over sum."""
        return float((self.lengths**2).sum() / self.lengths.sum())

    def ids(self, vocabulary: int) -> list[np.ndarray]:
        """Random token ids of each row, int32."""
        random = np.random.default_rng([SEED, 1])
        return [random.integers(0, vocabulary, n).astype(np.int32) for n in self.lengths.tolist()]


# The 52,002 rows of Alpaca with Llama 3's tokenizer: log-normals with the mean and deviation of the tokens of its
# instructions (17.4, 13.1) and of its answers (55.3, 54.9), around Llama 3.1's chat template (35) and an end token.
TEMPLATE, INSTRUCTION, ANSWER, LONGEST = 35, (2.636, 0.667), (3.671, 0.828), 1024


def make_rows(data: str, tiny: bool = False) -> Rows:
    """`dense`: rows of 4,096 tokens, all trained, 8 a step. `ragged`: Alpaca's lengths, 64 a step. `tiny` ones have a
    sixteenth of the length."""
    cut = 16 if tiny else 1
    if data == "dense":
        answers = np.full(256, 4096 // cut)
        return Rows(np.zeros_like(answers), answers, 8)
    random = np.random.default_rng(SEED)
    prompts = TEMPLATE + np.maximum(random.lognormal(*INSTRUCTION, 2048).round(), 1)
    answers = 1 + np.clip(random.lognormal(*ANSWER, 2048).round(), 1, LONGEST)
    return Rows((prompts // cut).astype(np.int64), np.maximum(answers // cut, 1).astype(np.int64), 64)


# ---------------------------------------------------------------- models

_LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
           "intermediate_size": 14336, "tie_word_embeddings": False},
    "3b": {**_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
           "intermediate_size": 8192, "tie_word_embeddings": True},
    "1b": {**_LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
           "intermediate_size": 8192, "tie_word_embeddings": True},
    "tiny": {**_LLAMA, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
             "intermediate_size": 128, "vocab_size": 512, "num_key_value_heads": 2, "tie_word_embeddings": False},
}  # fmt: skip
"""Sizes of Llama 3 8B, Llama 3.2 3B and 1B, and one to try the benchmark itself."""


def make_config(shape: str, dtype: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], dtype=dtype, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def useful_flops(shape: str, method: str, rows: Rows) -> dict[str, float]:
    """FLOPs of a real token: `useful`, and `recomputed` by full activation checkpointing (the layers' forward)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tunery.flops import Cost, cost_of, flops_per_token

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(make_config(shape, torch.bfloat16), dtype=torch.bfloat16)
        if method == "lora":
            model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    cost = cost_of(model)
    forward = Cost(cost.forward, 0, 0, 0, False, tuple((width, window, False) for width, window, _ in cost.attention))
    size = {"labelled": rows.labelled, "mean_length": rows.mean_length}
    return {"useful": flops_per_token(cost, **size), "recomputed": flops_per_token(forward, **size)}


def parameters(shape: str) -> int:
    """Parameters of a shape's model, by hand."""
    s = SHAPES[shape]
    hidden, query, kv = (
        s["hidden_size"],
        *(s[k] * s["head_dim"] for k in ("num_attention_heads", "num_key_value_heads")),
    )
    layer = hidden * (2 * query + 2 * kv + 3 * s["intermediate_size"]) + 2 * hidden
    return s["num_hidden_layers"] * layer + s["vocab_size"] * hidden * (1 if s["tie_word_embeddings"] else 2) + hidden


def too_large(method: str, shape: str, memory: int) -> str | None:
    """Why full fine-tuning cannot fit `memory` bytes whatever the batch, or None: each parameter has a float32 weight,
    gradient and two moments, and its bfloat16 copy in the forward."""
    needed = parameters(shape) * (4 + 4 + 8 + 2)
    if method != "full" or needed < memory:
        return None
    return f"does not fit: {needed / 2**30:.0f} GiB before any activation, the device has {memory / 2**30:.0f} GiB"


# ---------------------------------------------------------------- what one process measures


@dataclass
class Spec:
    """What one process measures. `overrides`: of Tunery's job, "key=value"; `checkpointing`: of the Trainer. It
    measures each of `data` for `seconds` after `warmup` steps, and begins nothing after `deadline` (time.time()).
    `sizes`: data -> the Trainer's batch size that an earlier process found to be the fastest."""

    contestant: str
    kind: str
    method: str
    shape: str
    data: list[str]
    seconds: float
    warmup: int
    deadline: float
    overrides: list[str] = field(default_factory=list)
    checkpointing: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
