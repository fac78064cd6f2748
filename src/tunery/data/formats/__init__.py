"""Formats: how a row of data becomes an Example. One file each, and the folder is the registry. A format has

    COLUMNS: dict[str, tuple[str, ...]]     our column name -> the names looked for in the data, the usual one first
    detect(row) -> bool                     does this row look like mine? Two formats never claim the same row
    parse(row, columns, tags) -> Example    raises RowError(reason, detail) for a row that cannot be used

`columns` maps our column names to the data's; one that is not in it is looked for under its usual name, and "" means
that the data has none. `tags` renames what is inside a column (see sharegpt). A dotted format loads from outside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tunery.config import kinds, load_kind
from tunery.errors import ConfigError
from tunery.types import Message, ToolCall

FOLDER = "data.formats"


class RowError(Exception):
    """This row cannot be used. `reason` is a short fixed phrase to count by, `detail` is for this row alone."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def load_format(name: str) -> Any:
    """The module of a format. Raises ConfigError naming the nearest known one."""
    module = load_kind(FOLDER, name)
    if not hasattr(module, "parse"):
        raise ConfigError(f"format {name!r}: the module has no parse(row, columns, tags)")
    return module


def detect_format(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str | None:
    """The format that recognises the most of these rows; None where none does. `columns` (our name -> the data's) says
    what is there under another name: only formats with such columns are asked, and see them under their usual names."""
    given = columns or {}
    modules = {name: load_format(name) for name in kinds(FOLDER)}
    asked = {name: module for name, module in modules.items() if given.keys() <= module.COLUMNS.keys()}
    found = {
        name: sum(bool(module.detect(_usual(row, given, module.COLUMNS))) for row in rows)
        for name, module in asked.items()
    }
    best = max(found, key=lambda name: found[name], default="")
    return best if found.get(best) else None


def _usual(row: Mapping[str, Any], given: Mapping[str, str], known: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    """The row with its columns under the names a format looks for first."""
    renamed = {known[ours][0]: row[theirs] for ours, theirs in given.items() if theirs in row}
    return {**{name: value for name, value in row.items() if name not in given.values()}, **renamed}


# ---------------------------------------------------------------- what several formats read the same way


def read_text(row: Mapping[str, Any], column: str, required: bool = False) -> str:
    """The text in a column. An absent or null one is "" unless `required`. Raises RowError."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if value is not None:
        raise RowError("wrong type", f"{column!r} is {describe(value)}, expected text")
    if required:
        raise RowError("missing column", f"{column!r} is {'null' if column in row else 'not in this row'}")
    return ""


def read_flag(row: Mapping[str, Any], column: str) -> bool | None:
    """A thumbs up (true) or down (false), or None where there is none; as text too, since a table has nothing else.
    Raises RowError."""
    value = row.get(column)
    if isinstance(value, str):
        value = {"true": True, "false": False, "": None}.get(value.strip().lower(), value)
    if value is None or isinstance(value, bool):
        return value
    hint = "columns: {label: ''} leaves it unread"
    raise RowError("wrong type", f"{column!r} is {describe(value)}, expected true or false ({hint})")


def read_margin(row: Mapping[str, Any], column: str) -> dict[str, float]:
    """{"margin": by how much the chosen answer of a pair is better}, for Example.meta; {} where the row does not say.
    Raises RowError."""
    value = row.get(column)
    if value is None or value == "":
        return {}
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        hint = "columns: {margin: ''} leaves it unread"
        raise RowError("bad margin", f"{column!r} is {value!r}, expected a number ({hint})")
    return {"margin": margin}


def read_tools(value: Any, column: str = "tools") -> list[dict[str, Any]] | None:
    """Tool definitions, given as a list or as JSON text of one, in the shape the official templates expect:
    [{"type": "function", "function": {"name": ..., ...}}]; a bare {"name": ...} is wrapped. Raises RowError."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("bad tools", f"{column!r} is not JSON: {error}") from None
    if value is None or value == []:
        return None
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        raise RowError("bad tools", f"{column!r} is {describe(value)}, expected a list")
    return [_tool(tool, column) for tool in tools]


def _tool(tool: Any, column: str) -> dict[str, Any]:
    if isinstance(tool, str):
        try:
            tool = json.loads(tool)
        except json.JSONDecodeError as error:
            raise RowError("bad tools", f"a tool in {column!r} is not JSON: {error}") from None
    if isinstance(tool, dict):
        if tool.get("type") == "function" and isinstance(tool.get("function"), dict):
            return tool
        if isinstance(tool.get("name"), str):
            return {"type": "function", "function": tool}
    raise RowError("bad tools", f"a tool in {column!r} is {describe(tool)} without a name")


def read_call(value: Any) -> ToolCall:
    """One function call: {"name", "arguments"}, or the same under "function" beside an "id"; the arguments an object
    or JSON text of one. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError("bad tool call", f"{describe(value)}, expected an object with a name and arguments")
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters"))
    if not isinstance(name, str) or not name:
        raise RowError("bad tool call", "the call has no name")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise RowError("bad tool call", f"the arguments of {name!r} are not JSON: {error}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError("bad tool call", f"the arguments of {name!r} are {describe(arguments)}, expected an object")
    identity = value.get("id")
    return ToolCall(name, arguments, identity if isinstance(identity, str) else None)


def read_calls(text: str) -> tuple[ToolCall, ...]:
    """Function calls written as JSON text: one object, or a list of them. Raises RowError."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError("bad tool call", f"not JSON: {error}") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError("bad tool call", "an empty list of calls")
    return tuple(read_call(call) for call in calls)


def read_media(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Any] | None:
    """Images, videos and audios of a row as [{"type": "image" | "video" | "audio", "value": ...}], or None."""
    media = []
    for column, kind in (("images", "image"), ("videos", "video"), ("audios", "audio")):
        value = row.get(columns.get(column, column))
        if value is not None:
            media += [{"type": kind, "value": item} for item in (value if isinstance(value, list) else [value])]
    return media or None


def shared_prefix(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages two conversations have in common at their start."""
    for count, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left != right:
            return count
    return min(len(chosen), len(rejected))


def describe(value: Any) -> str:
    """A value for a person: what JSON calls its type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
