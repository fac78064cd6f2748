"""Samples: made of completions, cut into examples, kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunery.data.loader import Cut
from tunery.objectives._generated import put, question
from tunery.types import Answer, Completion, Example, Sample, Tokens

TRUTHS = ("ground_truth", "solution", "answer")  # columns that say what is right, where a row has one


def truth_of(example: Example) -> Any:
    """What is right: a column of that name, else the answer that the row's conversation ends with; None without."""
    columns = example.meta.get("columns", {})
    given = next((columns[name] for name in TRUTHS if columns.get(name) is not None), None)
    if given is None and example.messages and example.messages[-1].role == "assistant":
        given = example.messages[-1].content
    return given


def where(example: Example) -> str:
    """file:row."""
    return f"{example.meta.get('file', 'the data')}:{example.meta.get('row', '?')}"


def make_answer(example: Example, text: str = "", ids: Sequence[int] = (), finish: str = "stop") -> Answer:
    columns = example.meta.get("columns", {})
    return Answer(question(example), text, list(ids), finish, truth_of(example), columns, where(example))


def make_sample(row: int, example: Example, prompt: np.ndarray, completion: Completion, limit: int) -> Sample:
    """A sample whose rewards are not known yet. `limit`: the longest a completion may be."""
    ids = np.concatenate([prompt, np.array(completion.ids, dtype=np.int32)])
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[len(prompt) :] = 1.0
    tokens = Tokens(ids, weights, {"limit": float(limit)})
    if completion.logps:
        put(tokens, "generated_logps", completion.logps)
    return Sample(row, tokens, make_answer(example, completion.text, completion.ids, completion.finish))


def runs(samples: Sequence[Sample], how: Cut) -> list[list[Sample]]:
    """A group's samples, in order, in runs that a stream has room for. Nothing that is learned makes the answers to a
    prompt stay together; only sharing it does."""
    found: list[list[Sample]] = []
    size = 0
    for sample in samples:
        length, own = len(sample.tokens), len(sample.answer.ids) + 1
        added = own if how.share and size else length
        if size and how.packing and size + added <= how.budget:
            found[-1].append(sample)
            size += added
        else:
            found.append([sample])
            size = length
    return found


# ---------------------------------------------------------------- in a checkpoint


def save_groups(path: Path, rollout: int, groups: Sequence[Sequence[Sample]]) -> None:
    """What further steps on a rollout need of its samples."""
    kept = [[_plain(sample) for sample in group] for group in groups]
    torch.save({"rollout": rollout, "groups": kept}, path)


def load_groups(path: Path) -> tuple[int, list[list[Sample]]]:
    """The rollout's number, and its samples without what only rewards need."""
    saved = torch.load(path, weights_only=True)
    return saved["rollout"], [[_sample(values) for values in group] for group in saved["groups"]]


def _plain(sample: Sample) -> dict[str, Any]:
    extra = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in sample.tokens.extra.items()}
    ids, weights = torch.from_numpy(sample.tokens.ids), torch.from_numpy(sample.tokens.weights)
    return {"row": sample.row, "ids": ids, "weights": weights, "extra": extra, "answer": len(sample.answer.ids)}


def _sample(values: dict[str, Any]) -> Sample:
    extra = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in values["extra"].items()}
    tokens = Tokens(values["ids"].numpy(), values["weights"].numpy(), extra)
    return Sample(values["row"], tokens, Answer((), "", tokens.ids[len(tokens) - values["answer"] :].tolist(), ""))
