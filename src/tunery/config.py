"""Strict typed configuration: YAML or JSON in, one clear error out, and the folder as the registry.

This file holds the mechanics only. Each knob is declared in the `Config` of the file that reads it; `job.py` puts the
sections together. A section with a `kind` (`objective: {kind: dpo, ...}`) is built from the `Config` of the module of
that name in its folder (`tunery.objectives.dpo`); a dotted kind loads a module from outside the package."""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue

from tunery.errors import ConfigError


class Config(BaseModel):
    """Base of every section: unknown keys and wrong types are refused ("3" is not 3), instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class KindConfig(Config):
    """Base of the `Config` of every file in a registry folder."""

    kind: str = Field("", description="which one: the name of the file, or a dotted module from outside")


C = TypeVar("C", bound=Config)


# ---------------------------------------------------------------- the folder is the registry


def kinds(folder: str) -> list[str]:
    """Names of the kinds in `tunery/<folder>/`, e.g. kinds("objectives") -> ["pretrain", "sft"]."""
    package = importlib.import_module(f"tunery.{folder}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def load_kind(folder: str, kind: str) -> ModuleType:
    """The module of a kind. Raises ConfigError naming the nearest known one."""
    if "." in kind:
        try:
            return importlib.import_module(kind)
        except ImportError as error:
            raise ConfigError(
                f"cannot import {kind!r} ({error}); a dotted kind must be an importable module"
            ) from error
    known = kinds(folder)
    if kind not in known:
        raise ConfigError(f"unknown kind {kind!r}{nearest(kind, known)} (known: {', '.join(known)})")
    return importlib.import_module(f"tunery.{folder}.{kind}")


def build(folder: str, config: KindConfig, *args: Any) -> Any:
    """The implementation of a section with a kind: the class in its module that is named like the folder's noun
    (objectives -> Objective, adapters -> Adapter, ...), called with the config."""
    noun = {"objectives": "Objective", "adapters": "Adapter", "optimizers": "Optimizer"}[folder]
    return getattr(load_kind(folder, config.kind), noun)(config, *args)


class _KindSchema:
    def __init__(self, folder: str):
        self.folder = folder

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        options: list[JsonSchemaValue] = [{"type": "string", "enum": kinds(self.folder)}]
        for kind in kinds(self.folder):
            schema = load_kind(self.folder, kind).Config.model_json_schema()
            schema.setdefault("properties", {})["kind"] = {"const": kind}
            options.append({**schema, "title": f"{self.folder}.{kind}", "required": ["kind"]})
        return {"anyOf": options}


def kind_field(folder: str, key: str, default: str) -> Any:
    """The type of a config field that is a kind: accepts "name" or {kind: name, ...} (without kind: the default one),
    holds the module's Config."""

    def resolve(value: Any) -> KindConfig:
        if isinstance(value, KindConfig):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a name or a mapping with a kind, got {value!r}")
        value = {"kind": default, **value}
        if not isinstance(value["kind"], str):
            raise ConfigError(f"{key}.kind: expected one of {', '.join(kinds(folder))}, got {value['kind']!r}")
        try:
            module = load_kind(folder, value["kind"])
        except ConfigError as error:
            raise ConfigError(f"{key}.kind: {error}") from error
        return validate(module.Config, dict(value), prefix=f"{key}.")

    return Annotated[SerializeAsAny[KindConfig], BeforeValidator(resolve), _KindSchema(folder)]


# ---------------------------------------------------------------- validation with errors for people


def validate(model: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """`model(**values)`, with every problem in one ConfigError, a line each, naming the key and the nearest one."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(model, problem, prefix) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _describe(model: type[BaseModel], problem: Any, prefix: str) -> str:
    path = [str(part) for part in problem["loc"] if not _is_type_tag(part)]
    where = prefix + ".".join(path)
    if problem["type"] == "extra_forbidden":
        siblings = _fields_at(model, path[:-1])
        hint = nearest(path[-1], siblings) or _elsewhere(model, path[-1], prefix)
        return f"{where}: unknown key{hint}" + (f" (known: {', '.join(siblings)})" if not hint and siblings else "")
    if problem["type"] == "missing":
        return f"{where}: is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _is_type_tag(part: Any) -> bool:
    """Pydantic puts the name of a union's branch into the path ("list[Source]"); a person did not write that."""
    return isinstance(part, str) and bool(re.search(r"[\[\(]|^(str|int|float|bool|dict|list)$|^[A-Z]\w*$", part))


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_of(inner)
        if found is not None and found is not KindConfig:
            return found
    return None


def _fields_at(model: type[BaseModel] | None, path: Sequence[str]) -> list[str]:
    for part in path:
        if model is None or part.isdigit():
            continue
        field = model.model_fields.get(part)
        model = _model_of(field.annotation) if field else None
    return sorted(model.model_fields) if model else []


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_of(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _elsewhere(model: type[BaseModel], word: str, prefix: str) -> str:
    """A key that exists, but in another section: `lr` at the top level is `optimizer.lr`."""
    paths = list(_all_keys(model))
    for section in ("optimizer", "schedule", "adapter", "objective"):
        if section in model.model_fields:
            default = model.model_fields[section].default
            if isinstance(default, KindConfig):
                paths += [f"{section}.{name}" for name in type(default).model_fields]
    last = {path.rsplit(".", 1)[-1]: path for path in reversed(paths)}
    close = difflib.get_close_matches(word, list(last), n=1, cutoff=0.8)
    return f"; did you mean {prefix + last[close[0]]!r}?" if close else ""


# ---------------------------------------------------------------- reading YAML and JSON


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number (PyYAML wants `1.0e-4`), a key given twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+$|^[-+]?\d[\d_]*\.[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """YAML (or JSON, which is YAML) to plain values."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ConfigError naming the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise ConfigError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` words from the command line onto a mapping (a copy comes back). Values are read as YAML.
    A sub-key of a short form keeps it: `model.dtype=bf16` on `model: builtin:tiny` gives {name: builtin:tiny, ...}."""
    short = {"model": "name", "objective": "kind", "adapter": "kind", "optimizer": "kind", "schedule": "kind"}
    result = json.loads(json.dumps(values))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: expected key=value, such as train.epochs=2")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text
        at: dict[str, Any] = result
        *parents, last = key.split(".")
        for depth, parent in enumerate(parents):
            inside = at.get(parent)
            if not isinstance(inside, dict):
                inside = {short[parent]: inside} if depth == 0 and parent in short and isinstance(inside, str) else {}
                at[parent] = inside
            at = inside
        at[last] = value
    return result
