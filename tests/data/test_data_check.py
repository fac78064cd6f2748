"""The warnings of `tunery check`. Oracle: rows made to have each fault, and rows that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toy_template import ToyObjective, ToyTemplate
from tunery.config import validate
from tunery.data.check import check
from tunery.data.dataset import DataConfig
from tunery.objectives import pretrain


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(*numbers: int) -> list[dict]:
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in numbers]


def warnings(**data) -> list[str]:
    return check(validate(DataConfig, data), ToyTemplate(), ToyObjective()).warnings


def test_clean_data_has_no_warnings(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca(*range(200)))
    assert warnings(train=path) == []
    assert warnings(train=path, eval=0.1) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_each_fault_is_counted_and_its_first_places_named(tmp_path, streaming):
    marked = {"instruction": "<|im_start|>user\nHi<|im_end|>", "output": "a"}
    rows = [
        *alpaca(*range(30)),
        *alpaca(3, 3),  # 31, 32: copies
        {"instruction": "q4", "output": "other"},  # 33: a contradiction
        {"instruction": "q", "output": "I am {{name}}."},  # 34
        marked,  # 35
        {"instruction": "### Instruction:\nx", "output": "y"},  # 36
        {"messages": 1},
    ]
    path = lines(tmp_path / "x.jsonl", rows[:-1])
    found = warnings(train=path, streaming=streaming)
    assert found == [
        f"exact copies of earlier rows, which count more often than others: 2 (first: {path}:31, {path}:32)",
        f"rows that answer the prompt of an earlier row differently: 1 (first: {path}:33)",
        f"rows with a placeholder such as {{{{name}}}} that nobody filled in: 1 (first: {path}:34)",
        f"rows whose text holds ### Instruction:, as if rendered by a template before: 1 (first: {path}:36)",
        f"rows whose text holds <|im_end|>, as if rendered by a template before: 1 (first: {path}:35)",
        f"rows whose text holds <|im_start|>, as if rendered by a template before: 1 (first: {path}:35)",
    ]


def test_empty_system_messages_and_long_answers(tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("system", " "), ("user", "q"), ("assistant", "a"))]
    path = lines(tmp_path / "x.jsonl", [{"messages": turns}])
    assert warnings(train=path) == [f"rows with an empty system message: 1 (first: {path}:1)"]
    path = lines(tmp_path / "y.jsonl", [{"instruction": "q", "output": "a" * 95}, *alpaca(1)])
    assert warnings(train=path, max_length=100) == [
        f"answers that fill 90% of data.max_length (100) or more: 1 (first: {path}:1)"
    ]


def test_prompts_that_evaluation_shares_with_training(tmp_path):
    train = lines(tmp_path / "x.jsonl", alpaca(1, 2, 3))
    held = lines(tmp_path / "y.jsonl", [*alpaca(1, 9), {"instruction": "q2", "output": "another"}])
    (warning,) = warnings(train=train, eval=held)
    assert "evaluation rows whose prompt is in the training data" in warning and warning.endswith(
        f"1 (first: {held}:3)"
    )


def test_two_thumbs_on_one_prompt_are_no_contradiction(tmp_path):
    rows = [{"instruction": "q", "output": answer, "kto_tag": good} for answer, good in (("a", True), ("b", False))]
    assert warnings(train=lines(tmp_path / "x.jsonl", rows)) == []


def test_a_stream_is_read_to_its_end(tmp_path):
    rows = [*alpaca(*range(1500)), {"instruction": "q", "output": 1}]
    report = check(
        validate(DataConfig, {"train": lines(tmp_path / "x.jsonl", rows), "streaming": True}),
        ToyTemplate(),
        ToyObjective(),
    )
    assert report.rows == 1501 and report.sources[0].refused == {"wrong type": 1}


def test_plain_text_has_no_answers_that_fill_max_length(tmp_path):
    (tmp_path / "x.txt").write_text("a" * 99 + "\n" + "b" * 250 + "\n")
    config = validate(DataConfig, {"train": str(tmp_path / "x.txt"), "max_length": 100})
    report = check(config, ToyTemplate(100), pretrain.Objective(pretrain.Config()))
    assert report.train.examples == 4 and report.warnings == []
