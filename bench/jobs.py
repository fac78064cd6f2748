"""The jobs that the trainers are compared on: a random model of a real shape, real rows, and both on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

LORA = {"rank": 8, "alpha": 16}
MARGIN = 16  # tokens that neighbours may differ by when they are tokenised together
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUMBERED = ("added_tokens_decoder", "additional_special_tokens")  # keys of tokenizer_config.json with tokens cut away
MODEL, MODEL_FP32, ADAPTER, ROWS, TOKENS = "model", "model-float32", "adapter", "rows.jsonl", "tokens.jsonl"


@dataclass(frozen=True)
class Shape:
    """A Qwen2 model's sizes, with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Job:
    """`rows` examples of LLaMA-Factory's alpaca_en_demo in their order, `batch_size` a step, one epoch; `long`: each
    is a conversation of as many of its rows as fit `max_length` tokens."""

    name: str
    title: str
    shape: Shape
    rows: int
    batch_size: int
    max_length: int = 1024
    full: bool = False
    long: bool = False

    @property
    def lr(self) -> float:
        return 2e-5 if self.full else 2e-4


SMALL = Shape(hidden=512, layers=10, heads=8, kv_heads=2, intermediate=1536, vocabulary=32_000)
QWEN = Shape(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocabulary=151_936)
TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=0)

_A = Job("A", "46.5M parameters, LoRA, batch 4", SMALL, rows=80, batch_size=4)
JOBS = {
    job.name: job
    for job in (
        _A,
        replace(_A, name="B", title="46.5M parameters, LoRA, batch 16", rows=128, batch_size=16),
        Job("C", "Qwen2.5-0.5B's shape and tokenizer, LoRA, batch 4", QWEN, rows=32, batch_size=4),
        replace(_A, name="D", title="46.5M parameters, full fine-tuning, batch 4", full=True),
        replace(_A, name="E", title="46.5M parameters, LoRA, conversations of up to 2,048 tokens, batch 2",
                rows=16, batch_size=2, max_length=2048, long=True),
    )
}  # fmt: skip


def tiny(job: Job) -> Job:
    """The same with a model that trains in seconds, to try the benchmark itself."""
    shape = replace(TINY, vocabulary=job.shape.vocabulary)
    title = f"a trial with 2 layers ({job.title})"
    return replace(job, title=title, shape=shape, rows=min(job.rows, 6 * job.batch_size))


@dataclass
class Prepared:
    """A job on disk. `folder` holds the model (in bfloat16, and the same values in float32), the adapter (LoRA's first
    weights, so that all start alike), rows.jsonl for who reads rows, and tokens.jsonl ({input_ids, labels}, labels
    -100 where nothing is trained) for who takes tokens. `lengths` and `labelled`: tokens and trained targets of each
    row; `flops`: useful FLOPs of a token (flops.py)."""

    job: Job
    folder: Path
    lengths: list[int]
    labelled: list[int]
    flops: float
    facts: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        """What a contestant is told of the job."""
        job = asdict(self.job) | {"lr": self.job.lr}
        names = {"model": MODEL, "model_fp32": MODEL_FP32, "adapter": ADAPTER, "rows_file": ROWS, "tokens_file": TOKENS}
        return {"job": job, "lora": LORA, **{key: str(self.folder / name) for key, name in names.items()}}


def step_sums(values: list[int], batch_size: int) -> list[int]:
    """Sums of `values`, one a row, over each step's rows; the last step has what is left."""
    return [sum(values[start : start + batch_size]) for start in range(0, len(values), batch_size)]


def prepare(job: Job, assets: Path, folder: Path) -> Prepared:
    """Write the job to `folder`, and count its tokens as Tunery renders them. Raises TuneryError for assets that cannot
    be read."""
    from tunery.flops import flops_per_token

    folder.mkdir(parents=True)
    save_model(job, assets, folder)
    rows = json.loads((assets / "datasets/llamafactory/alpaca_en_demo.json").read_text(encoding="utf-8"))
    conversations = [_conversation(row) for row in rows]
    if job.long:
        conversations = _long(job, conversations, folder)
    usable, _ = _tokens(job, conversations[: 2 * job.rows], folder)
    usable, sequences = _tokens(job, usable[: job.rows], folder)
    assert len(usable) == job.rows, f"job {job.name}: only {len(usable)} rows of {job.rows} can be used"
    with (folder / TOKENS).open("w", encoding="utf-8") as file:
        for ids, labels in sequences:
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    lengths = [len(ids) for ids, _ in sequences]
    labelled = [sum(label != -100 for label in labels[1:]) for _, labels in sequences]
    squares = float(np.square(lengths, dtype=np.float64).sum())
    cost, parameters = _cost(job, folder)
    flops = flops_per_token(cost, labelled=sum(labelled) / sum(lengths), mean_length=squares / sum(lengths))
    facts = {"parameters": parameters, "longest": max(lengths), "mean_length": sum(lengths) / len(lengths)}
    return Prepared(job, folder, lengths, labelled, flops, facts)


# ------------------------------------------------------------ rows


def _conversation(row: dict[str, str]) -> list[dict[str, str]]:
    """One Alpaca row as messages."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _joined(conversations: list[Any], lengths: list[int], opening: int, limit: int) -> list[Any]:
    """Neighbours put together while they fit `limit`; a turn after the first lacks the `opening` of a conversation."""
    joined: list[list[dict[str, str]]] = []
    room = 0
    for conversation, length in zip(conversations, lengths, strict=True):
        if length > room:
            joined.append([])
            room = limit
        joined[-1] += conversation
        room -= length - opening
    return joined


def _long(job: Job, conversations: list[Any], folder: Path) -> list[Any]:
    """Conversations as long as the cut-off allows, give or take what tokenising neighbours together changes."""
    usable, sequences = _tokens(job, conversations[: 16 * job.rows], folder)
    lengths = [len(ids) for ids, _ in sequences]
    _, [(pair, _)] = _tokens(job, [usable[0] + usable[1]], folder)
    return _joined(usable, lengths, lengths[0] + lengths[1] - len(pair), job.max_length - MARGIN)


def _tokens(job: Job, conversations: list[Any], folder: Path) -> tuple[list[Any], list[tuple[list[int], list[int]]]]:
    """The conversations that Tunery uses, and each one's (ids, labels) as it renders them. Leaves the rows in
    rows.jsonl."""
    from tunery.data.store import TokenStore
    from tunery.job import load_job
    from tunery.read import read_data

    path = folder / ROWS
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations), encoding="utf-8")
    store = read_data(
        load_job({"model": str(folder / MODEL), "data": data_section(str(path), job.max_length)})
    ).data.train
    assert isinstance(store, TokenStore)
    usable = [conversations[store.origin(number)[1] - 1] for number in range(len(store))]
    sequences = [store.sequences(number)[0] for number in range(len(store))]
    return usable, [(t.ids.tolist(), np.where(t.weights > 0, t.ids, -100).tolist()) for t in sequences]


def data_section(path: str, max_length: int) -> dict[str, Any]:
    """Tunery's `data:` section of a job."""
    return {"train": path, "max_length": max_length, "workers": 1, "cache": False}


# ------------------------------------------------------------ model


def _config(job: Job) -> Any:
    from transformers import Qwen2Config

    shape = job.shape
    return Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, intermediate_size=shape.intermediate,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def save_model(job: Job, assets: Path, folder: Path) -> None:
    """Random weights in bfloat16, as published ones come, the tokenizer beside them, and LoRA's first weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(job), dtype=torch.float32).to(torch.bfloat16)
    for name, dtype in ((MODEL_FP32, torch.float32), (MODEL, torch.bfloat16)):
        model.to(dtype).save_pretrained(str(folder / name))
        save_tokenizer(assets / "tokenizers/qwen2.5", job.shape.vocabulary, folder / name)
    if not job.full:
        config = LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        get_peft_model(model, config).save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)


def save_tokenizer(source: Path, size: int, folder: Path) -> None:
    """The tokenizer of `source` with its first merges only, so that it has at most `size` tokens. (transformers gives a
    Qwen2 model a Qwen2 tokenizer, whatever lies beside it: one of another family would be read wrong.)"""
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if size < len(whole["model"]["vocab"]) + len(whole["added_tokens"]):
        _cut(whole, size)
        config = {key: value for key, value in config.items() if key not in NUMBERED}
    for name, values in (("tokenizer.json", whole), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(values), encoding="utf-8")


def _cut(whole: dict[str, Any], size: int) -> None:
    """Keep the first merges and the tokens of the chat template, `size` tokens in all."""
    special = [token for token in whole["added_tokens"] if token["content"] in SPECIAL]
    kept = size - len(special)
    vocabulary = {token: number for token, number in whole["model"]["vocab"].items() if number < kept}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"]]
    whole["model"] |= {"vocab": vocabulary, "merges": [pair for pair in pairs if "".join(pair) in vocabulary]}
    whole["added_tokens"] = [{**token, "id": kept + number} for number, token in enumerate(special)]


def _cost(job: Job, folder: Path) -> tuple[Any, int]:
    """The model's Cost (flops.py), LoRA included, and its number of parameters; nothing is computed."""
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tunery.flops import cost_of

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(job))
        parameters = sum(p.numel() for p in model.parameters())
        if not job.full:
            config = PeftConfig.from_pretrained(str(folder / ADAPTER))
            config.inference_mode = False
            model = get_peft_model(model, config)
    return cost_of(model), parameters
