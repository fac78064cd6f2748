"""A LLaMA-Factory mapping as typed options: names checked, values cast, and every problem collected for one error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunery.compat.llamafactory_options import ALIASES, GOVERNED, IGNORED, KNOWN, READ, REFUSED
from tunery.config import nearest


class Options:
    """Their options by name, cast to their types; collects problems and notes on the way."""

    def __init__(self, values: Mapping[str, Any]):
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        for given, value in values.items():
            name = ALIASES.get(given, given)
            if name not in KNOWN:
                self.problems.append(f"{given}: unknown option{nearest(str(given), sorted(KNOWN))}")
            elif value is not None:
                off = value is False and name.endswith("_strategy")  # what YAML makes of a bare `no`
                self.values[name] = value = "no" if off else value
                self._judge(name, value)

    def _judge(self, name: str, value: Any) -> None:
        if name in REFUSED:
            harmless, near = REFUSED[name]
            plain = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
            off = () if any(value is True for value in harmless) else (False,)
            if plain not in (*off, "", *harmless) and plain not in ([], {}):
                self.refuse(name, near)
        elif name in IGNORED:
            self.note(f"{name}: ignored; {IGNORED[name]}")
        else:
            for governor, names in GOVERNED.items():
                if name in names.split():
                    self.note(f"{name}: ignored; no effect without {governor}")

    def __call__(self, name: str) -> Any:
        """The value, or LLaMA-Factory's default."""
        kind, default = READ[name]
        if name not in self.values:
            return default
        try:
            return _cast(kind, self.values[name])
        except (TypeError, ValueError):
            self.problems.append(f"{name}: expected {_WORDS[kind]}, got {json.dumps(self.values[name])}")
            return default

    def note(self, text: str) -> None:
        self.notes.append(text)

    def refuse(self, name: str, near: str) -> None:
        self.problems.append(f"{name}: {json.dumps(self.values.get(name))} is not in Tunery; nearest: {near}")


_WORDS = {
    "str": "a text",
    "path": "a path, true or false",
    "int": "a whole number",
    "float": "a number",
    "number": "a number",
    "bool": "true or false",
    "list": "names with commas between them",
    "dict": "a mapping",
}


def _cast(kind: str, value: Any) -> Any:
    """YAML's value as the option's type: `1e-4` in quotes is a number, "a, b" a list. Raises ValueError."""
    if kind == "list":
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [str(item).strip() for item in items if str(item).strip()]
    if kind == "dict":
        value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError
        return value
    word = str(value).lower()
    if kind == "bool" or (kind == "path" and word in ("true", "false")):
        if word not in ("true", "false", "1", "0"):
            raise ValueError
        return word in ("true", "1")
    if isinstance(value, bool | list | dict):
        raise ValueError
    if kind in ("str", "path"):
        return str(value)
    number = float(value)
    if kind == "int" and not number.is_integer():
        raise ValueError
    return int(number) if kind == "int" or (kind == "number" and number.is_integer()) else number
