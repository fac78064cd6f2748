"""Rows to Examples: the format is chosen once for a source, then every row is parsed, or refused with its reason."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from tunery.config import kinds
from tunery.data.formats import FOLDER, RowError, detect_format, load_format
from tunery.data.report import SourceReport
from tunery.data.sources import Located, read_rows
from tunery.errors import ConfigError, DataError
from tunery.types import Example, Message, Refused

_LOOKED_AT = 100  # rows that decide the format and the columns


def read_examples(
    located: Located, report: SourceReport, streaming: bool = False, keep_columns: bool = False
) -> Iterator[tuple[str, int, Example | Refused]]:
    """(file, row, Example or why not) of a source, in order; `Example.meta` has "file" and "row", and "columns", the
    row as it was read, where `keep_columns`. What is found out about the source goes into `report`; a format that is
    there already is kept. Raises DataError where no format fits, ConfigError for wrong columns."""
    rows = read_rows(located, streaming)
    first = list(itertools.islice(rows, _LOOKED_AT))
    while first and all(isinstance(row, Refused) for _, _, row in first):
        more = list(itertools.islice(rows, _LOOKED_AT))
        first += more
        if not more:
            break
    seen = [row for _, _, row in first if not isinstance(row, Refused)]
    if seen and not report.format:
        choose_format(located, seen, report)
        report.unread = [] if keep_columns else report.unread
    parse = load_format(report.format).parse if report.format else None
    columns, tags = report.columns, located.source.tags
    unseen = {name for name in located.source.columns.values() if name and seen} - {
        name for row in seen for name in row
    }
    for file, number, row in itertools.chain(first, rows):
        report.rows += 1
        if isinstance(row, Refused) or parse is None:
            yield file, number, row if isinstance(row, Refused) else Refused("not an object")
            continue
        if unseen:
            unseen -= row.keys()
        try:
            example = parse(row, columns, tags)
            check_example(example)
        except RowError as error:
            yield file, number, Refused(error.reason, error.detail)
            continue
        example.meta["file"] = file
        example.meta["row"] = number
        if keep_columns:
            example.meta["columns"] = dict(row)
        yield file, number, example
    if unseen:
        raise _no_column(located, unseen, seen)


def _no_column(located: Located, unseen: set[str], rows: Sequence[Mapping[str, Any]]) -> ConfigError:
    """The error for a column that was given and is in no row."""
    there = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    ours, theirs = next((ours, name) for ours, name in located.source.columns.items() if name in unseen)
    near = difflib.get_close_matches(theirs, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(
        f"{located.key}.columns.{ours}: no row of {located.name} has a column {theirs!r}{hint} "
        f"(there: {', '.join(there)})"
    )


def choose_format(located: Located, rows: Sequence[Mapping[str, Any]], report: SourceReport) -> None:
    """Set `format`, `columns` and `unread` of the report, from the configuration and the first rows (at least one)."""
    source = located.source
    if source.format != "auto":
        report.format = source.format
    else:
        name = detect_format(rows, source.columns) or detect_format(rows)
        if name is None:
            unseen = set(source.columns.values()) - {"", *(name for row in rows for name in row)}
            if unseen:
                raise _no_column(located, unseen, rows)
            columns = ", ".join(map(repr, itertools.islice(rows[0], 12))) + (", ..." if len(rows[0]) > 12 else "")
            raise DataError(
                f"{located.key}: no format fits {located.name}, whose rows have the columns {columns}. Name one with "
                f"format: ({', '.join(kinds(FOLDER))}) and say what its columns are called here with columns:, such as "
                "{prompt: question, response: answer}"
            )
        report.format = name
    module = load_format(report.format)
    if source.tags:
        _check_names(source.tags, getattr(module, "TAGS", {}), f"{located.key}.tags", report.format)
    _check_names(source.columns, module.COLUMNS, f"{located.key}.columns", report.format)
    report.columns = choose_columns(module.COLUMNS, {**located.defaults, **source.columns}, rows)
    if located.ranking:
        _check_pairs(located, report.columns, rows)
    there = {str(name) for row in rows for name in row}
    report.unread = sorted(there - set(report.columns.values()))


def _check_pairs(located: Located, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError where dataset_info.json says ranking, and no row has a chosen and a rejected answer."""
    pair = columns.get("chosen", ""), columns.get("rejected", "")
    if not any(all(row.get(name) is not None for name in pair) for row in rows):
        there = ", ".join(map(str, dict.fromkeys(name for row in rows for name in row)))
        raise ConfigError(
            f"{located.ranking}: ranking is true, but no row has both {pair[0]!r} and {pair[1]!r} (there: {there}); "
            "name its columns chosen and rejected, or leave ranking out"
        )


def choose_columns(
    known: Mapping[str, Sequence[str]], given: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Our column names -> the data's: as given, else the first usual name that the rows have, else the usual one."""
    there = {name for row in rows for name, value in row.items() if value is not None}
    claimed = set(given.values())
    columns = {}
    for ours, usual in known.items():
        free = [name for name in usual if name not in claimed]
        found = next((name for name in free if name in there), free[0] if free else "")
        columns[ours] = given.get(ours, found)
    return columns


def _check_names(given: Mapping[str, str], known: Mapping[str, Any], key: str, form: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            there = f"known: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{key}.{name}: format {form} does not know this name{hint} ({there})")


def check_example(example: Example) -> None:
    """What no format may let through. Raises RowError."""
    if example.text is None and not example.messages:
        raise RowError("no messages")
    texts = [message.content for message in example.messages] if example.text is None else [example.text]
    for message in (*example.messages, *(example.rejected or ())):
        if message.reasoning:
            texts.append(message.reasoning)
        for call in message.tool_calls:
            texts.append(json.dumps([call.name, call.arguments], ensure_ascii=False))
    texts += [message.content for message in example.rejected or ()]
    if example.tools:
        texts.append(json.dumps(example.tools, ensure_ascii=False))
    for text in texts:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = text[error.start]
                raise RowError(
                    "invalid Unicode", f"half a surrogate pair (\\u{ord(found):04x}), not a character"
                ) from None


def identity(example: Example) -> Hashable:
    """Equal for examples that say the same: the text, or the turns with their calls (the pair's better side)."""
    return example.text if example.text is not None else tuple(_turn(message) for message in example.messages)


def whole_identity(example: Example) -> Hashable:
    """`identity` with everything else that is learned from: the worse side of a pair, the label, the tools."""
    if example.rejected is None and example.label is None and example.tools is None:
        return identity(example)
    worse = tuple(_turn(message) for message in example.rejected or ())
    return identity(example), worse, example.label, json.dumps(example.tools, sort_keys=True, default=str)


def _turn(message: Message) -> Hashable:
    if not message.tool_calls and not message.reasoning:
        return message.role, message.content
    calls = tuple(
        (call.name, json.dumps(call.arguments, sort_keys=True, ensure_ascii=False)) for call in message.tool_calls
    )
    return message.role, message.content, message.reasoning, calls


def to_dict(example: Example) -> dict[str, Any]:
    """An Example as plain values, for JSON."""
    from dataclasses import asdict

    return asdict(example)


def from_dict(values: Mapping[str, Any]) -> Example:
    """The inverse of `to_dict`."""
    from tunery.types import Span, ToolCall

    def message(item: dict[str, Any]) -> Message:
        calls, spans = (ToolCall(**call) for call in item["tool_calls"]), (Span(**span) for span in item["spans"])
        return Message(**{**item, "tool_calls": tuple(calls), "spans": tuple(spans)})

    def messages(items: list[dict[str, Any]] | None) -> list[Message] | None:
        return None if items is None else [message(item) for item in items]

    return Example(
        **{**values, "messages": messages(values["messages"]), "rejected": messages(values["rejected"])}  # type: ignore
    )
