"""The data benchmark. Oracles: token counts by the template, one row at a time, and a table worked by hand."""

from __future__ import annotations

import json
import math
import sys

import pytest
from bench.data_rivals import Clock

from bench import data
from tunery.data.template import load_template
from tunery.models.load import ModelConfig, load_tokenizer
from tunery.types import Message

ROWS = [{"instruction": f"Say {n}", "input": "", "output": "word " * n} for n in range(1, 40)]


@pytest.fixture
def given(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return {"data": str(tmp_path / "rows.json"), "tokenizer": "builtin:tiny", "pack": 256, "workers": 1}


def test_ours_counts_what_the_template_makes(given):
    result = data.tunery(given)
    template = load_template("auto", load_tokenizer(ModelConfig(name="builtin:tiny")), max_length=data.LONGEST)
    tokens = sum(
        len(sequence)
        for row in ROWS
        for sequence in template.encode([Message("user", row["instruction"]), Message("assistant", row["output"])])
    )
    assert (result["rows"], result["tokens"]) == (len(ROWS), tokens)
    assert result["streams"] >= math.ceil(tokens / given["pack"])
    assert 0 < result["seconds_to_store"] <= result["seconds"]


@pytest.mark.slow
def test_a_run_in_a_process(given):
    result = data.run("tunery", sys.executable, given)
    assert result["rows"] == len(ROWS) and result["cpu_seconds"] > 0
    assert "39 rows" in data.line_of("tunery", result)
    with pytest.raises(RuntimeError, match=r"tunery: .*nowhere"):
        data.run("tunery", sys.executable, {**given, "data": "nowhere.json"})


def test_the_clock_counts_processor_seconds():
    clock = Clock()
    while clock.read()["cpu_seconds"] < 0.02:
        pass
    assert clock.read()["seconds"] > 0


def test_the_section():
    def run(seconds):
        return {"rows": 1000, "streams": 5, "tokens": 20000, "seconds": seconds, "cpu_seconds": 2 * seconds,
                "refused": {"empty answer": 3}}  # fmt: skip

    result = {
        "runs": {"tunery": [run(2.0), run(4.0), run(1.0)], "trl": [run(20.0), run(20.0), run(30.0)]},
        "rivals": {"trl": "1.16.0"}, "workers": 2, "command": "c", "machine": "m", "versions": {}, "date": "d",
    }  # fmt: skip
    text = data.section(result)
    assert "| Tunery | 500 | 2.0 | 4.0 | 20,000 | 5 |  |" in text
    assert "| TRL 1.16.0 | 50 | 20.0 | 40.0 | 20,000 | 5 | 10.0 (5.0 to 30.0) |" in text
    assert "| LLaMA-Factory | not measured | | | | | |" in text
    assert "nothing to train: 3 (empty answer)." in text
