"""The whole job: what a person writes becomes what every file reads. Oracle: the same job written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from tunery.compat.llamafactory import is_llamafactory
from tunery.config import kinds, load_kind
from tunery.config_file import parse_yaml
from tunery.data.sources import Source
from tunery.errors import ConfigError
from tunery.job import Job, TrainConfig, load_job

FULL = """
model: builtin:tiny
data:
  train: a.jsonl
  eval: 0.02
  template: auto
  max_length: 512
  too_long: truncate
objective: sft
adapter: {kind: lora, rank: 4, alpha: 8, targets: all-linear}
optimizer: {kind: adamw, lr: 2e-4, weight_decay: 0.0}
schedule: {kind: cosine, warmup: 0.03}
train: {epochs: 3, batch_size: 16, seed: 42}
eval: {every: 50}
report: {to: wandb}
output: runs/here
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(FULL)
    return file


def test_a_whole_file(path):
    job = load_job(path)
    assert job.model.name == "builtin:tiny"
    assert [source.path for source in job.data.train] == ["a.jsonl"] and job.data.eval == 0.02
    assert (job.data.max_length, job.data.too_long) == (512, "truncate")
    assert (job.objective.kind, job.adapter.kind, job.adapter.rank) == ("sft", "lora", 4)  # type: ignore[attr-defined]
    assert (job.optimizer.lr, job.schedule.kind, job.schedule.warmup) == (2e-4, "cosine", 0.03)  # type: ignore
    assert (job.train.epochs, job.train.batch_size, job.eval.every, job.report.to) == (3, 16, 50, ["wandb"])


def test_the_resolved_configuration_reads_back_as_itself(path, tmp_path):
    job = load_job(path)
    for name, text in (("r.yaml", yaml.safe_dump(job.model_dump(mode="json"))), ("r.json", job.model_dump_json())):
        (tmp_path / name).write_text(text)
        again = load_job(tmp_path / name)
        assert again == job and again.adapter == job.adapter
    assert load_job(job.model_dump(mode="json")) == job
    assert load_job(job) is job


def test_overrides_come_last(path):
    job = load_job(path, ["train.epochs=1", "model.dtype=float32", "adapter.rank=2", "data.train.samples=10"])
    assert (job.train.epochs, job.model.name, job.model.dtype) == (1, "builtin:tiny", "float32")
    assert (job.adapter.rank, job.adapter.alpha) == (2, 8)  # type: ignore[attr-defined]
    assert (job.data.train[0].path, job.data.train[0].samples) == ("a.jsonl", 10)
    assert load_job(job, ["train.epochs=2"]).train.epochs == 2


def test_the_same_in_all_forms():
    short = load_job({"model": "m", "data": {"train": "a"}, "objective": "sft", "schedule": "linear"})
    long = load_job(
        {
            "model": {"name": "m"},
            "data": {"train": [{"path": "a"}]},
            "objective": {"kind": "sft"},
            "schedule": {"kind": "linear"},
        }
    )
    assert short == long
    assert load_job({"data": {"train": ["a", {"path": "b", "weight": 2}]}}).data.train[1].weight == 2


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "full"), ("false", "none"), ("offload", "offload"), ("selective", "selective")]
)
def test_checkpointing_is_a_rung_or_yes_or_no(written, meant):
    assert load_job({}, [f"train.checkpointing={written}"]).train.checkpointing == meant
    jsonschema.validate({"train": {"checkpointing": yaml.safe_load(written)}}, Job.model_json_schema())
    assert load_job({}).train.checkpointing == "auto"


def test_a_section_with_nothing_in_it_is_its_defaults():
    assert load_job({"train": None, "model": None, "adapter": None}) == load_job({})


def test_errors_name_the_file(path):
    with pytest.raises(ConfigError) as caught:
        load_job(path, ["lr=1e-4", "train.epochs=many"])
    assert str(caught.value).splitlines() == [
        f"{path}: train.epochs: expected a number, got 'many'",
        f"{path}: lr: unknown key; did you mean 'optimizer.lr'?",
    ]
    with pytest.raises(ConfigError, match=r"^lr: unknown key"):
        load_job({"lr": 1})
    with pytest.raises(ConfigError, match=r"^nothing: unknown key"):
        load_job({"nothing": None})


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("lr", "optimizer.lr"),
        ("epochs", "train.epochs"),
        ("batch_size", "train.batch_size"),
        ("max_length", "data.max_length"),
        ("rank", "adapter.rank"),
        ("warmup", "schedule.warmup"),
        ("train_on", "objective.train_on"),
    ],
)
def test_a_key_in_the_wrong_place_is_told_the_right_one(key, section):
    with pytest.raises(ConfigError, match=f"^{key}: unknown key; did you mean '{section}'"):
        load_job({key: 1})


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"train": {"batch_size": 0}}, "train.batch_size: must be greater than or equal to 1, got 0"),
        ({"train": {"epochs": -1}}, "train.epochs: must be greater than 0, got -1"),
        ({"train": {"save_every": 1.5}}, "train.save_every: a share must be below 1"),
        ({"train": {"resume": 3}}, "train.resume: expected true or false or text, got 3"),
        ({"data": {"too_long": "cut"}}, "data.too_long: must be 'drop', 'truncate' or 'error', got 'cut'"),
        ({"data": {"train": [{"pth": "a"}]}}, "data.train.0.path: is required"),
        ({"model": {"dtype": "bf16"}}, "model.dtype: must be .*did you mean"),
        ({"report": {"to": ["wand"]}}, "report.to.0: must be .*did you mean 'wandb'"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr: must be greater than 0, got 0"),
    ],
)
def test_wrong_values(values, error):
    with pytest.raises(ConfigError, match=error):
        load_job(values)


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = [found for field in annotation.model_fields.values() for found in models(field.annotation)]
        return [annotation, *inner]
    return [found for part in getattr(annotation, "__args__", ()) for found in models(part)]


def test_every_knob_is_described():
    """Descriptions become the command line's help, the docs' table and the web form."""
    every = models(Job) + [load_kind(f, k).Config for f in ("objectives", "adapters", "optimizers") for k in kinds(f)]
    assert {TrainConfig, Source} <= set(every)  # a section, and what stands in a list in one
    for model in every:
        for name, field in model.model_fields.items():
            assert field.description or name == "kind", f"{model.__module__}.{model.__name__}.{name}"


def test_the_json_schema_knows_every_section_and_kind():
    schema = Job.model_json_schema()
    assert set(schema["properties"]) == set(Job.model_fields)
    adapter = {option["properties"]["kind"].get("const"): option for option in schema["properties"]["adapter"]["anyOf"]
               if "properties" in option}  # fmt: skip
    assert set(adapter) == {*kinds("adapters"), None}  # None: a module from outside
    assert "rank" in adapter["lora"]["properties"]
    text = json.dumps(schema)
    assert schema["additionalProperties"] is False and all(f"#/$defs/{name}" in text for name in schema["$defs"]), (
        "no definition dangles"
    )


ROOT = Path(__file__).resolve().parents[1]
# YAML that a reader would paste into a file: the examples, the pages, and short forms written out here.
RIGHT = {
    **{path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.yaml")},
    **{
        f"{page.name}:{number}": text
        for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]
        for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))
    },
    "full": FULL,
    "one source": "data: {train: {path: a.jsonl, samples: 5}, eval: b.jsonl}",
    "sources": "data: {train: [a.jsonl, {path: b.jsonl}], eval: [c.jsonl]}",
    "names": "{model: builtin:tiny, schedule: linear, optimizer: adamw, report: {to: [wandb, mlflow]}}",
    "default kind": "adapter: {rank: 4}",
    "from outside": "{objective: my.loss, adapter: {kind: my.adapter, size: 3}}",
    "empty section": "{train: null, model: builtin:tiny}",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_the_json_schema_takes_what_is_right(text):
    """Oracle: jsonschema, as an editor would apply it."""
    values = parse_yaml(text)
    if is_llamafactory(values):
        pytest.skip("in LLaMA-Factory's shape")
    jsonschema.Draft202012Validator(Job.model_json_schema()).validate(values)


@pytest.mark.parametrize(
    "text",
    [
        "model: 3",
        "model: {nam: builtin:tiny}",
        "data: {train: 3}",
        "data: {train: [3]}",
        "data: {train: {samples: 3}}",
        "data: {eval: true}",
        "schedule: cosinus",
        "report: {to: wand}",
        "report: {to: [wand]}",
        "adapter: lorra",
        "adapter: {kind: lora, rnk: 4}",
        "optimizer: {lr: fast}",
        "lr: 1.0e-4",
    ],
)
def test_the_json_schema_refuses_what_is_wrong(text):
    values = parse_yaml(text)
    assert not jsonschema.Draft202012Validator(Job.model_json_schema()).is_valid(values)
    with pytest.raises(ConfigError):
        load_job(values)


@pytest.mark.parametrize("source", [5, None, ["a.yaml"], ("a", "b")])
def test_what_is_no_job_is_told_what_is(source):
    with pytest.raises(
        ConfigError, match=r"path of a YAML or JSON file, a mapping .*; got .*\((int|NoneType|list|tuple)"
    ):
        load_job(source)
