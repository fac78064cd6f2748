"""Oracle: the same run with every sequence whole (train.share_prompts: false), in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tunery.data.loader
from tiny_runs import WORDS, final_weights, losses, model_folder, tiny_job
from tunery.data.collate import collate
from tunery.engine import Engine
from tunery.frozen import keep_frozen_states
from tunery.job import Job
from tunery.loop import run_job
from tunery.read import read_data
from tunery.resolve import resolve
from tunery.setup import Run, set_up

# Assistant turns before the last message lose all but their first word, so each turn is trained in a sequence of its
# own, and those of a conversation begin alike.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split(' ')[0] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def words(i: int, count: int) -> str:
    return " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(count))


def pairs(folder: Path) -> str:
    rows = [
        {"prompt": f"{i}: {words(i, 5 + i)}", "chosen": words(i, 2 + i % 4), "rejected": words(i + 3, 1 + i % 3)}
        for i in range(16)
    ]
    return write_jsonl(folder / "pairs.jsonl", rows)


def conversations(folder: Path) -> str:
    """Among them some of one turn, which are one sequence."""
    rows = []
    for i in range(16):
        turns = [("user", words(i, 9)), ("assistant", words(i, 3)), ("user", words(i, 2)), ("assistant", words(i, 4))]
        turns = turns[: 2 if i % 4 == 0 else 4]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return write_jsonl(folder / "conversations.jsonl", rows)


def job_of(folder: Path, kind: str, name: str = "run", **changes: Any) -> Job:
    train = {"batch_size": 4, "epochs": 1, "max_grad_norm": None, **changes.pop("train", {})}
    if kind == "sft":
        if not (folder / "model").is_dir():
            model_folder(folder / "model")
            path = folder / "model" / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": REWRITES}))
        data = conversations(folder)
    else:
        data = pairs(folder)
    return tiny_job(
        folder, objective={"kind": kind}, data={"train": data, "eval": 0.25}, train=train,
        output=str(folder / name), **changes,
    )  # fmt: skip


def prepared(job: Job) -> Run:
    engine = Engine(job.model.dtype)
    read = read_data(job)
    Path(job.output).mkdir(parents=True, exist_ok=True)
    return set_up(resolve(job, engine, read), engine, read, None)


@pytest.fixture
def tokens(monkeypatch):
    """Of all streams that were made."""
    made: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        batch = collate(*args, **kwargs)
        made.append(batch.n_tokens)
        return batch

    monkeypatch.setattr(tunery.data.loader, "collate", counting)
    return made


@pytest.mark.parametrize(("kind", "adapter"), [("dpo", {"kind": "lora", "rank": 4}), ("sft", "full")])
def test_the_run_does_not_depend_on_sharing(tmp_path, kind, adapter, tokens):
    curves, weights, computed = [], [], []
    cuts = [
        {"share_prompts": False}, {}, {"micro_tokens": 64}, {"packing": False}, {"checkpointing": "full"},
    ]  # fmt: skip
    for number, train in enumerate(cuts):
        tokens.clear()
        job = job_of(tmp_path, kind, f"run{number}", train=train, adapter=adapter)
        run_job(job)
        curves.append(losses(job.output))
        weights.append(final_weights(Path(job.output)))
        computed.append(sum(tokens))
    assert len(curves[0]) == 3 and computed[1] < 0.8 * computed[0] and computed[1:] == [computed[1]] * 4
    for curve, weight in zip(curves[1:], weights[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-9)
        for name, value in weight.items():
            torch.testing.assert_close(value, weights[0][name], rtol=1e-6, atol=1e-8)


def test_streams_are_filled_with_what_they_hold(tmp_path):
    """By the lengths that examples have in a stream, those of the loader as well."""
    run = prepared(job_of(tmp_path, "dpo", train={"micro_tokens": 120, "batch_size": 12}))
    assert run.cut.share
    step = run.loader.step(0)
    sizes = [batch.n_tokens for batch in step.micro]
    assert sum(sizes) == run.loader.lengths.sum() < run.data.train.lengths.sum() == step.tokens
    assert max(sizes) <= 120 or max(sizes) == run.loader.longest
    assert step.longest == run.loader.longest and step.largest == max(sizes)
    largest, several = run.loader.largest_stream(0, run.total_steps)
    assert largest is not None and largest.n_tokens == max(sizes) and several and largest.continues


def test_noise_that_depends_on_the_length_turns_it_off(tmp_path):
    run = prepared(job_of(tmp_path, "dpo", train={"neftune": 5.0}))
    assert not run.cut.share and sum("NEFTune" in note for note in run.policy.notes) == 1
    asked_off = prepared(job_of(tmp_path, "dpo", train={"neftune": 5.0, "share_prompts": False}))
    assert not asked_off.cut.share and not any("NEFTune" in note for note in asked_off.policy.notes)


def test_rows_that_share_nothing_try_nothing(tmp_path):
    run = prepared(tiny_job(tmp_path))
    assert not run.cut.share and "shares" not in vars(run.policy) and not run.policy.notes


def test_kept_states_are_of_whole_sequences(tmp_path):
    job = job_of(tmp_path, "sft", adapter={"kind": "freeze", "layers": 1, "cache": True}, train={"epochs": 2})
    run = prepared(job)
    assert run.cut.share
    keep_frozen_states(run)
    assert run.policy.boundary is not None and not run.cut.share and run.loader.how == run.cut
    assert not any(batch.continues for batch in run.loader.step(0).micro)
