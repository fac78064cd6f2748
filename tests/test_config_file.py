"""Configuration files and overrides. Oracle: YAML 1.2's and JSON's own meaning of a value, the mapping that a person
would write by hand, and the sentence they should read."""

from __future__ import annotations

import json

import pytest

from tunery.config_file import apply_overrides, parse_yaml, read_config
from tunery.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("2.0e-4", 2e-4), ("-3e+2", -300.0), (".5e-1", 0.05), ("5.e3", 5000.0),
        ("3", 3), ("0.5", 0.5), ("true", True), ("null", None), ("~", None), ("e5", "e5"), ("1e", "1e"),
        ("abc1e-4", "abc1e-4"), ("2024-01-31", "2024-01-31"), ("'1e-4'", "1e-4"), ("[1e-3, 2]", [0.001, 2]),
        ("{kind: lora, lr: 1e-4}", {"kind": "lora", "lr": 1e-4}), ('{"a": [1, 2]}', {"a": [1, 2]}), ("", None),
    ],
)  # fmt: skip
def test_yaml_values(text, value):
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


def read(tmp_path, text, name="job.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def test_files(tmp_path):
    assert read(tmp_path, "a:\n  b: 1e-4 # comment\n  c: 中文\n") == {"a": {"b": 1e-4, "c": "中文"}}
    assert read(tmp_path, json.dumps({"a": {"b": 1e-4}}), "job.json") == {"a": {"b": 1e-4}}
    assert read(tmp_path, "\ufeffa: 1\n") == {"a": 1}, "a byte-order mark is no part of the first key"
    assert read(tmp_path, '\ufeff{"a": 1}', "job.json") == {"a": 1}
    assert read(tmp_path, "base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\n")["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "name", "error"),
    [
        ("a: 1\nb: 2\na: 3\n", "job.yaml", r"job\.yaml: line 3: the key 'a' is given twice"),
        ("t:\n  a: 1\n  a: 2\n", "job.yaml", r"job\.yaml: line 3: the key 'a' is given twice"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "job.json", r"job\.json: the key 'c' is given twice"),
        ("a: [1, 2\n", "job.yaml", r"job\.yaml: not valid YAML: (.|\n)*line 2"),
        ("a:\n\t- b\n", "job.yaml", r"job\.yaml: not valid YAML"),
        ("? [1, 2]\n: 3\n", "job.yaml", r"job\.yaml: line 1: a key must be a word"),
        ("a: !!python/object/apply:os.getcwd []\n", "job.yaml", r"job\.yaml: not valid YAML"),
        ("{'a': 1}", "job.json", r"job\.json: not valid JSON"),
        ("- a\n- b\n", "job.yaml", r"job\.yaml: expected `key: value` lines, found list"),
        ("# nothing\n", "job.yaml", r"job\.yaml: is empty"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, name, error):
    with pytest.raises(ConfigError, match=error):
        read(tmp_path, text, name)


def test_missing_files(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"quikstart\.yaml: no such file; did you mean 'quickstart\.yaml'\?"):
        read_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match=r"no such file$"):
        read_config(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; give a YAML or JSON file, such as .*quickstart\.yaml"):
        read_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "latin.yaml")


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("values", "word", "result"),
    [
        ({}, "train.epochs=2", {"train": {"epochs": 2}}),
        ({"train": None}, "train.epochs=2", {"train": {"epochs": 2}}),
        ({"train": {"seed": 1}}, "train.epochs=2", {"train": {"seed": 1, "epochs": 2}}),
        ({"optimizer": {"lr": 1}}, "optimizer.lr=1e-4", {"optimizer": {"lr": 1e-4}}),
        ({"model": "x"}, "model.dtype=bfloat16", {"model": {"name": "x", "dtype": "bfloat16"}}),
        ({"adapter": "lora"}, "adapter.rank=4", {"adapter": {"kind": "lora", "rank": 4}}),
        ({"schedule": "wsd"}, "schedule.decay=0.2", {"schedule": {"kind": "wsd", "decay": 0.2}}),
        ({"adapter": {"kind": "lora"}}, "adapter=full", {"adapter": "full"}),
        ({"data": {"train": "a"}}, "data.train.samples=5", {"data": {"train": {"path": "a", "samples": 5}}}),
        ({"data": {"train": ["a", "b"]}}, "data.train.1=c", {"data": {"train": ["a", "c"]}}),
        ({"data": {"train": [{"path": "a"}]}}, "data.train.0.samples=5",
         {"data": {"train": [{"path": "a", "samples": 5}]}}),
        ({}, "adapter.targets=[q_proj, v_proj]", {"adapter": {"targets": ["q_proj", "v_proj"]}}),
        ({}, "data.system=a: b: c", {"data": {"system": "a: b: c"}}),
        ({}, "output=runs/a=b", {"output": "runs/a=b"}),
        ({}, "report.name=", {"report": {"name": None}}),
    ],
)  # fmt: skip
def test_overrides(values, word, result):
    before = json.dumps(values)
    assert apply_overrides(values, [word]) == result
    assert json.dumps(values) == before, "a copy comes back"


@pytest.mark.parametrize(
    ("values", "word", "error"),
    [
        ({}, "train.epochs", "expected key=value, such as train.epochs=2"),
        ({}, "=2", "expected key=value"),
        ({}, "train..epochs=2", "expected key=value"),
        ({"output": "x"}, "output.name=2", "output is 'x', which has no keys"),
        ({"train": 3}, "train.epochs=2", "train is 3, which has no keys"),
        ({"data": {"train": ["a"]}}, "data.train.1=b", "'1' is no place in a list of 1"),
        ({"data": {"train": ["a"]}}, "data.train.samples=b", "'samples' is no place in a list of 1"),
    ],
)
def test_overrides_that_cannot_be(values, word, error):
    with pytest.raises(ConfigError, match=error.replace(".", r"\.")):
        apply_overrides(values, [word])
