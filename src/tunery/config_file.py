"""Configuration as plain values: YAML and JSON files to mappings, and `key=value` words onto them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunery.config import nearest
from tunery.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number (PyYAML wants `1.0e-4`), `2024-01-01` is text, a key given twice
    is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+$|^[-+]?\d[\d_]*\.[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    own: set[str] = set()
    for key_node, _ in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{line}: a key must be a word")
        if key_node.value in own and key_node.value != "<<":
            raise ConfigError(f"{line}: the key {key_node.value!r} is given twice")
        own.add(key_node.value)
    loader.flatten_mapping(node)  # `<<: *defaults`, whose keys come first and may be given again
    return {str(key.value): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """YAML (or JSON, which is YAML) to plain values."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises ConfigError naming the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise ConfigError(f"{path}: no such file{near}") from None
    except IsADirectoryError:
        inside = next((f", such as {file}" for file in sorted(path.glob("*.yaml"))), "")
        raise ConfigError(f"{path}: is a folder; give a YAML or JSON file{inside}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values = json.loads(text, object_pairs_hook=_pairs) if path.suffix == ".json" else parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    if values is None:
        raise ConfigError(f"{path}: is empty")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's objects, with a key given twice an error as in YAML."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return result


# Where a bare word stands for a mapping with this key.
_SHORT = {"model": "name", "objective": "kind", "adapter": "kind", "optimizer": "kind", "schedule": "kind"}
_SHORT |= {"data.train": "path", "data.eval": "path"}


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` words from the command line onto a mapping (a copy comes back). Values are read as YAML.
    A sub-key of a short form keeps it: `model.dtype=bfloat16` on `model: builtin:tiny` gives {name: builtin:tiny, ...};
    a number is a place in a list: `data.train.0.samples=100`. Raises ConfigError."""
    result = copy.deepcopy(dict(values))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{word!r}: expected key=value, such as train.epochs=2")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text
        *parents, last = key.split(".")
        at: Any = result
        for depth, parent in enumerate(parents):
            place = _place(at, parent, word)
            at[place] = _opened(at[place] if isinstance(at, list) else at.get(place), parents[: depth + 1], word)
            at = at[place]
        at[_place(at, last, word)] = value
    return result


def _place(at: dict[str, Any] | list[Any], word: str, override: str) -> Any:
    """The key of a mapping, or the index of a list."""
    if isinstance(at, dict):
        return word
    if not word.isdigit() or int(word) >= len(at):
        raise ConfigError(f"{override!r}: {word!r} is no place in a list of {len(at)} (they count from 0)")
    return int(word)


def _opened(value: Any, path: list[str], override: str) -> dict[str, Any] | list[Any]:
    """What stands at `path`, as something that has keys."""
    if isinstance(value, dict | list):
        return value
    if value is None:
        return {}
    short = _SHORT.get(".".join(path))
    if short is None or not isinstance(value, str):
        raise ConfigError(f"{override!r}: {'.'.join(path)} is {value!r}, which has no keys")
    return {short: value}
