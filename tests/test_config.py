"""Strict configuration. Oracle: the sentence a person should read."""

from __future__ import annotations

import sys
from typing import Literal

import pytest
from pydantic import Field, model_validator

from tunery.config import (
    Config,
    KindConfig,
    Steps,
    build,
    kind_field,
    kinds,
    load_kind,
    nearest,
    validate,
)
from tunery.errors import ConfigError


class Inner(Config):
    path: str = Field(description="p")
    samples: int | None = Field(default=None, gt=0, description="s")
    columns: dict[str, str] = Field(default={}, description="c")


class Section(Config):
    epochs: float = Field(default=3, gt=0, description="e")
    every: Steps | None = Field(default=None, gt=0, description="n")
    colour: Literal["red", "green"] = Field(default="red", description="c")
    items: list[Inner] = Field(default=[], description="i")
    either: list[Inner] | float | None = Field(default=None, description="x")

    @model_validator(mode="after")
    def _together(self) -> Section:
        if self.colour == "green" and self.epochs > 5:
            raise ValueError("green goes with at most 5 epochs")
        return self


class Whole(Config):
    section: Section = Field(default=Section(), description="s")
    adapter: kind_field("adapters", "adapter", "lora") = Field(default="lora", description="a")  # type: ignore
    flag: bool = Field(default=False, description="f")


def problems(**values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(Whole, values)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"section": {"epoch": 1}}, "section.epoch: unknown key; did you mean 'epochs'?"),
        ({"section": {"Epochs": 1}}, "section.Epochs: unknown key; did you mean 'epochs'?"),
        ({"sectoin": {}}, "sectoin: unknown key; did you mean 'section'?"),
        ({"epochs": 1}, "epochs: unknown key; did you mean 'section.epochs'?"),
        ({"rank": 4}, "rank: unknown key; did you mean 'adapter.rank'?"),
        ({"section": {"rank": 4}}, "section.rank: unknown key; did you mean 'adapter.rank'?"),
        ({"zzzz": 1}, "zzzz: unknown key (known: adapter, flag, section)"),
        ({"section": {"items": [{"path": "a", "smples": 1}]}}, "section.items.0.smples: unknown key; did you mean"),
        ({"section": {"items": [{}]}}, "section.items.0.path: is required"),
        ({"section": {"epochs": "3"}}, "section.epochs: expected a number, got '3'"),
        ({"section": {"epochs": 0}}, "section.epochs: must be greater than 0, got 0"),
        ({"section": {"epochs": float("inf")}}, "section.epochs: must be a finite number, got inf"),
        ({"section": {"colour": "gren"}}, "section.colour: must be 'red' or 'green', got 'gren'; did you mean"),
        ({"section": {"colour": "green", "epochs": 9}}, "section: green goes with at most 5 epochs"),
        ({"section": 3}, "section: expected a mapping, got 3"),
        ({"section": {"items": [{"path": "a", "samples": 1.5}]}}, "section.items.0.samples: expected a whole number"),
        ({"section": {"items": [{"path": "a", "columns": {"Text": 3}}]}}, "section.items.0.columns.Text: expected"),
        ({"section": {"either": "x"}}, "section.either: expected a list or a number, got 'x'"),
        ({"section": {"either": [{"pth": "a", "path": "b"}]}}, "section.either.0.pth: unknown key; did you mean"),
        ({"section": {"every": 2.5}}, "section.every: a share must be below 1, and a number of steps whole, got 2.5"),
        ({"flag": "true"}, "flag: expected true or false, got 'true'"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"adapter": {"kind": "lora", "rnk": 1}}, "adapter.rnk: unknown key; did you mean 'rank'?"),
        ({"adapter": "lorra"}, "adapter.kind: unknown kind 'lorra'; did you mean 'lora'?"),
        ({"adapter": {"kind": 3}}, "adapter.kind: expected one of"),
        ({"adapter": 3}, "adapter: expected a name or a mapping with a kind, got 3"),
        ({"adapter": {"kind": "no.such.module"}}, "adapter.kind: cannot import 'no.such.module'"),
        ({"adapter": {"kind": ".relative"}}, "adapter.kind: cannot import '.relative'"),
        ({"adapter": {"kind": "email.message"}}, "adapter.kind: 'email.message' has no class Config"),
    ],
)  # fmt: skip
def test_one_problem_is_one_line(values, line):
    found = problems(**values)
    assert len(found) == 1 and found[0].startswith(line), found


def test_every_problem_at_once():
    found = problems(sectoin={}, section={"epochs": "3", "colour": 1}, adapter={"rnk": 1, "rank": "8"}, flag=3)
    assert [line.split(":")[0] for line in found] == [
        "section.epochs", "section.colour", "adapter.rank", "adapter.rnk", "flag", "sectoin",
    ]  # fmt: skip


def test_a_share_or_steps():
    for good in (0.1, 0.99, 1, 500, None):
        assert validate(Section, {"every": good}).every == good


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validate(Section, {}).epochs = 4  # type: ignore[misc]


def test_nearest():
    assert nearest("epoch", ["epochs", "every"]) == "; did you mean 'epochs'?"
    assert nearest("xyz", ["epochs", "every"]) == ""


# ---------------------------------------------------------------- the folder is the registry


def test_the_folder_is_the_registry():
    assert {"sft", "pretrain"} <= set(kinds("objectives"))
    assert "lora" in kinds("adapters") and "adamw" in kinds("optimizers")
    for folder, noun in (("objectives", "Objective"), ("adapters", "Adapter"), ("optimizers", "Optimizer")):
        for kind in kinds(folder):
            module = load_kind(folder, kind)
            assert module.Config.model_fields["kind"].default == kind, "a kind is named like its file"
            assert hasattr(module, noun)


def test_forms_of_a_kind():
    assert validate(Whole, {}).adapter.kind == "lora"
    assert validate(Whole, {"adapter": "full"}).adapter.kind == "full"
    assert validate(Whole, {"adapter": {"rank": 2}}).adapter.rank == 2, "no kind: the default one"
    assert validate(Whole, {"adapter": load_kind("adapters", "lora").Config(rank=5)}).adapter.rank == 5


def test_a_kind_from_outside(tmp_path, monkeypatch):
    (tmp_path / "outside_pkg").mkdir()
    (tmp_path / "outside_pkg" / "__init__.py").write_text("")
    (tmp_path / "outside_pkg" / "mine.py").write_text(
        "from tunery.config import KindConfig\n"
        "class Config(KindConfig):\n    kind: str = 'outside_pkg.mine'\n    size: int = 1\n"
        "class Adapter:\n    def __init__(self, config):\n        self.config = config\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = validate(Whole, {"adapter": {"kind": "outside_pkg.mine", "size": 7}}).adapter
    assert isinstance(config, KindConfig)
    assert build("adapters", config).config.size == 7
    assert problems(adapter={"kind": "outside_pkg.mine", "sze": 7}) == [
        "adapter.sze: unknown key; did you mean 'size'?"
    ]
    sys.modules.pop("outside_pkg.mine")
