"""Oracle: the store's own tokens."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from tiny_runs import tiny_job, write_pairs
from tunery.inspect import coloured, histogram, inspect, trained_texts, whole_characters
from tunery.models.load import ModelConfig, load_tokenizer
from tunery.types import Tokens


def test_what_is_trained_is_shown_and_coloured(tmp_path):
    out = io.StringIO()
    inspect(tiny_job(tmp_path), Console(file=out, width=200), rows=2, seed=0)
    text = out.getvalue()
    assert text.count("trained: ") == 2 and "<|im_end|>" in text and "train.jsonl:" in text
    tokenizer = load_tokenizer(ModelConfig())
    ids = np.array(tokenizer("Hello there 你好").input_ids, np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[[0, 2]] = 1
    shown = coloured(Tokens(ids, weights), tokenizer)
    green = "".join(shown.plain[s.start : s.end] for s in shown.spans if "green" in str(s.style))
    assert green == tokenizer.decode(ids[2:3])  # the first token is predicted from nothing, so not trained


def test_characters_of_several_tokens_stay_whole():
    tokenizer = load_tokenizer(ModelConfig())
    ids = tokenizer("a🦖b").input_ids
    runs = [tokenizer.decode(run) for run, _ in whole_characters(ids, tokenizer)]
    assert "".join(runs) == "a🦖b" and "\ufffd" not in "".join(runs) and len(runs) < len(ids)


def test_trained_texts_are_the_unbroken_runs():
    tokenizer = load_tokenizer(ModelConfig())
    ids = np.array(tokenizer("one two three four").input_ids, np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[1] = weights[-1] = 1
    texts = trained_texts(Tokens(ids, weights), tokenizer)
    assert texts == [tokenizer.decode(ids[1:2]), tokenizer.decode(ids[-1:])]


def test_histogram_counts_everything():
    lines = histogram(np.array([1, 1, 2, 9, 30]))
    assert sum(int(line.rsplit(" ", 1)[1]) for line in lines) == 5
    assert histogram(np.array([7, 7]))[0].endswith(" 2")


# ---------------------------------------------------------------- pairs, thumbs, prompts


def looked_at(tmp_path, width: int, rows: list[dict] | None = None, **changes: object) -> str:
    if rows is None:
        path = write_pairs(tmp_path / "pairs.jsonl", 8)
    else:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = io.StringIO()
    data = {"train": str(path), "eval": None, "max_length": 256, "workers": 1, "cache": False}
    inspect(tiny_job(tmp_path, data=data, **changes), Console(file=out, width=width), rows=1)
    text = out.getvalue().rpartition("\ntemplate ")[0]
    lines = text.splitlines()
    shown = lines[next(i for i, line in enumerate(lines) if "──" in line) :]
    assert max(map(cell_len, shown)) <= width
    return text


@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo", "cpo", "reward"])
def test_a_pair_is_shown_side_by_side_with_its_prompt_once(tmp_path, kind):
    text = looked_at(tmp_path, 140, objective=kind)
    assert text.count("<|im_start|>│user") == 1 and "a prompt of " in text
    lines = text.replace("│", "").splitlines()
    (head,) = (line for line in lines if "chosen: " in line)
    assert head.index("chosen: ") < head.index("rejected: ")
    assert sum("yes" in line and "no<" in line and line.index("yes") < line.index("no<") for line in lines) == 1


def test_on_a_narrow_terminal_the_answers_are_one_below_the_other(tmp_path):
    text = looked_at(tmp_path, 60, objective="dpo")
    heads = [line for line in text.splitlines() if line.startswith(("chosen: ", "rejected: "))]
    assert len(heads) == 2 and text.count("<|im_start|>│user") == 1


@pytest.mark.parametrize("width", [200, 100, 72, 40])
def test_chinese_pairs_fit_every_terminal_and_margins_are_said(tmp_path, width):
    row = {"chosen": "鸭梨和苹果。" * 12, "rejected": "胡萝卜。" * 9, "margin": 1.5}
    rows = [{"prompt": f"{i}请说一种水果的名字。" * 6, **row} for i in range(3)]
    text = looked_at(tmp_path, width, rows, objective="reward")
    assert "margin 1.5" in " ".join(text.split()) and text.count("萝") == 9  # a title may be wrapped


def test_thumbs_are_said(tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": f"{i}!", "label": False} for i in range(4)]
    assert "label:   not wanted" in looked_at(tmp_path, 100, rows, objective="kto")
    assert "chosen: " in looked_at(tmp_path, 100, objective="bco")


def test_a_prompt_for_rewards_has_its_ground_truth(tmp_path):
    reward = {"rewards": [{"kind": "length", "limit": 20, "buffer": 5}]}
    rows = [{"prompt": f"{i} + 2?", "answer": "four"} for i in range(4)]
    text = looked_at(tmp_path, 100, rows, objective="grpo", **reward)
    assert "ground truth: 'four'" in text and "0 trained" in text
    assert "(none in this row)" in looked_at(tmp_path, 100, [{"prompt": f"Say {i}."} for i in range(4)],
                                             objective="grpo", **reward)  # fmt: skip
