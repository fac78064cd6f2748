"""Oracle: the store's own tokens."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from tiny_runs import tiny_job
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
