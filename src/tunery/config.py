"""Strict typed configuration: plain values in, one clear error out, and the folder as the registry.

This file holds the mechanics only. Each knob is declared in the `Config` of the file that reads it; `job.py` puts the
sections together, and `config_file.py` makes plain values of files and command-line words. A section with a `kind`
(`objective: {kind: dpo, ...}`) is built from the `Config` of the module of that name in its folder
(`tunery.objectives.dpo`); a dotted kind loads a module from outside the package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializeAsAny,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

from tunery.errors import ConfigError


class Config(BaseModel):
    """Base of every section: unknown keys and wrong types are refused ("3" is not 3), instances are frozen."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


class KindConfig(Config):
    """Base of the `Config` of every file in a registry folder."""

    kind: str = Field("", description="which one: the name of the file, or a dotted module from outside")


C = TypeVar("C", bound=Config)


def _share_or_steps(value: float | int) -> float | int:
    if value >= 1 and isinstance(value, float):
        raise ValueError("a share must be below 1, and a number of steps whole")
    return value


# A share of the run's steps when below 1, else a number of steps.
Steps = Annotated[int | float, AfterValidator(_share_or_steps)]


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
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(
                f"cannot import {kind!r} ({error}); a dotted kind must be an importable module: install it, or put its "
                "folder on PYTHONPATH"
            ) from error
    known = kinds(folder)
    if kind not in known:
        raise ConfigError(f"unknown kind {kind!r}{nearest(kind, known)} (known: {', '.join(known)})")
    return importlib.import_module(f"tunery.{folder}.{kind}")


def build(folder: str, config: KindConfig, *args: Any) -> Any:
    """The implementation of a section with a kind: the class in its module that is named like the folder's noun
    (objectives -> Objective, adapters -> Adapter, ...), called with the config."""
    nouns = {"objectives": "Objective", "adapters": "Adapter", "optimizers": "Optimizer", "rewards": "Reward"}
    noun = nouns[folder]
    return getattr(load_kind(folder, config.kind), noun)(config, *args)


@dataclass(frozen=True)
class _KindOf:
    """Marks a field as a kind of a folder: for the JSON schema, and to know its keys before it is resolved."""

    folder: str
    default: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        dotted = {"type": "string", "pattern": r"\."}  # a module from outside, whose keys are not known here
        options: list[JsonSchemaValue] = [{"anyOf": [{"type": "string", "enum": kinds(self.folder)}, dotted]}]
        for kind in kinds(self.folder):
            schema = load_kind(self.folder, kind).Config.model_json_schema()
            schema.setdefault("properties", {})["kind"] = {"const": kind}
            needed = [] if kind == self.default else ["kind"]
            options.append({**schema, "title": f"{self.folder}.{kind}", "required": needed})
        outside = {"type": "object", "properties": {"kind": dotted}, "required": ["kind"]}
        return {"anyOf": [*options, {**outside, "title": f"{self.folder}: a module from outside"}]}


@dataclass(frozen=True)
class ShortForms:
    """Marks a field whose validator also takes short forms, for the JSON schema: one element for a list of them and,
    where `key` is given, text for a mapping with only that key."""

    key: str | None = None

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        def with_short(form: JsonSchemaValue) -> list[JsonSchemaValue]:
            if form.get("type") == "array":
                one = with_short(form["items"])
                return [*one, {**form, "items": {"anyOf": one}}]
            if self.key is None or "$ref" not in form:
                return [form]
            text = handler.resolve_ref_schema(form)["properties"][self.key]
            return [{name: text[name] for name in ("type", "enum") if name in text}, form]

        long = handler(core_schema)
        return {"anyOf": [form for branch in long.get("anyOf", [long]) for form in with_short(branch)]}


def kind_field(folder: str, key: str, default: str) -> Any:
    """The type of a config field that is a kind: accepts "name" or {kind: name, ...} (without kind: the default one),
    holds the module's Config."""

    def resolve(value: Any) -> KindConfig:
        if isinstance(value, KindConfig):
            return value
        try:
            return _resolve(folder, key, default, value)
        except ConfigError as error:  # carried through pydantic, so that every problem of a job comes in one error
            raise PydanticCustomError("kind", "{text}", {"text": str(error)}) from error

    return Annotated[SerializeAsAny[KindConfig], BeforeValidator(resolve), _KindOf(folder, default)]


def _resolve(folder: str, key: str, default: str, value: Any) -> KindConfig:
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
    if not hasattr(module, "Config"):
        raise ConfigError(f"{key}.kind: {value['kind']!r} has no class Config, which every kind must have")
    return validate(module.Config, value, prefix=f"{key}.")


# ---------------------------------------------------------------- validation with errors for people


def validate(model: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """`model(**values)`, with every problem in one ConfigError, a line each, naming the key and the nearest one."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        found: dict[tuple[str, ...], list[Any]] = {}
        for problem in error.errors():
            found.setdefault(_path(problem, values), []).append(problem)
        # Of a union's branches, the one that got deeper is the one that was meant.
        inner = [path for path in found if not any(path == other[: len(path)] != other for other in found)]
        lines = [_describe(model, list(path), found[path], prefix) for path in inner]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _path(problem: Any, values: Any) -> tuple[str, ...]:
    """Where a problem is, in the words of the file: pydantic puts the branch of a union into its path, and the list
    that a short form was put into; a person wrote neither."""
    path: list[str] = []
    for part in problem["loc"]:
        if _holds(values, part):
            values = values[part]
        elif problem["type"] != "missing" or part != problem["loc"][-1]:
            continue
        path.append(str(part))
    return tuple(path)


def _holds(values: Any, part: Any) -> bool:
    if isinstance(values, Mapping):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def _describe(model: type[BaseModel], path: list[str], problems: list[Any], prefix: str) -> str:
    """One line for all problems of one key."""
    where, first = (prefix + ".".join(path)).rstrip("."), problems[0]
    if first["type"] == "kind":
        return first["msg"]
    if first["type"] == "extra_forbidden":
        siblings = _fields_at(model, path[:-1])
        hint = _elsewhere(model, path[-1], prefix, 1.0) or nearest(path[-1], siblings)
        hint = hint or _elsewhere(model, path[-1], prefix, 0.8)
        return f"{where}: unknown key{hint}" + (f" (known: {', '.join(siblings)})" if not hint and siblings else "")
    if first["type"] == "missing":
        return f"{where}: is required"
    wanted = [_EXPECTED[problem["type"]] for problem in problems if problem["type"] in _EXPECTED]
    if wanted and len(wanted) == len(problems):
        return f"{where}: expected {' or '.join(dict.fromkeys(wanted))}, got {first['input']!r}"
    rest = next(problem for problem in problems if problem["type"] not in _EXPECTED)
    message = str(rest["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    got = "" if isinstance(rest["input"], Mapping) else f", got {rest['input']!r}"
    choices = re.findall(r"'([^']*)'", message) if rest["type"] == "literal_error" else []
    return f"{where}: {message}{got}{nearest(str(rest['input']), choices)}"


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


def _elsewhere(model: type[BaseModel], word: str, prefix: str, cutoff: float) -> str:
    """A key that exists, but in another section: `lr` at the top level is `optimizer.lr`."""
    paths = list(_all_keys(model))
    for name, field in model.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, _KindOf):
                paths += [f"{name}.{key}" for key in load_kind(mark.folder, mark.default).Config.model_fields]
    last = {path.rsplit(".", 1)[-1]: path for path in reversed(paths)}
    close = difflib.get_close_matches(word, list(last), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + last[close[0]]!r}?" if close else ""
