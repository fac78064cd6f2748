"""Local data files to rows, a little at a time: json, jsonl, csv, tsv, parquet, arrow, txt.

Every reader yields (row, value): `row` is what a person would look for, 1-based - the line number in jsonl and txt, the
record number elsewhere - and `value` the row as a dict, or Refused where this row alone is unreadable. A file that
cannot be read at all (missing, empty, not UTF-8, not what its name says) raises DataError."""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tunery.data.formats import describe
from tunery.errors import DataError
from tunery.types import Refused

Rows = Iterator[tuple[int, "dict[str, Any] | Refused"]]
Documents = Literal["line", "paragraph", "file"]

EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_BATCH = 1024


def read_file(path: Path, documents: Documents = "line") -> Rows:
    """The rows of a data file, by its extension. `documents`: what one document of a txt file is."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from _nonempty(path, _json(path))
    elif suffix in (".jsonl", ".ndjson"):
        yield from _nonempty(path, _json_lines(path))
    elif suffix in (".csv", ".tsv"):
        yield from _nonempty(path, _csv(path, "\t" if suffix == ".tsv" else ","))
    elif suffix in (".parquet", ".arrow"):
        yield from _nonempty(path, _parquet(path) if suffix == ".parquet" else _arrow(path))
    elif suffix == ".txt":
        yield from _nonempty(path, _text(path, documents))
    else:
        raise DataError(
            f"{path}: unknown kind of file {suffix or 'without extension'!r} (known: {' '.join(EXTENSIONS)})"
        )


def missing(path: Path) -> DataError:
    """The error for a path that does not exist, with the nearest one that does."""
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"{path}: no such file; the folder {parent} does not exist either")
    there = {entry.stem: entry.name for entry in sorted(parent.iterdir(), reverse=True)}
    near = difflib.get_close_matches(path.stem, list(there), n=1, cutoff=0.7)  # the extension would make all alike
    hint = f"; did you mean {parent / there[near[0]]}?" if near else f" in {parent}"
    return DataError(f"{path}: no such file{hint}")


def _nonempty(path: Path, rows: Rows) -> Rows:
    count = 0
    try:
        for item in rows:
            count += 1
            yield item
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not count:
        raise DataError(f"{path}: the file is empty" + ("" if path.stat().st_size == 0 else " (it holds no rows)"))


def _row(value: Any) -> dict[str, Any] | Refused:
    return value if isinstance(value, dict) else Refused("not an object", f"the row is {describe(value)}")


# ---------------------------------------------------------------- text with lines


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """(1-based line, its text without the line end). Only \\n and \\r\\n end a line: JSON text may hold U+2028."""
    for number, line in enumerate(file, 1):
        if number == 1:
            if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path}: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from None
        yield number, text.rstrip("\r\n")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file first, such as "
        f"with: iconv -f GB18030 -t UTF-8"
    )


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, text in _lines(file, path):
            if not text or text.isspace():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                yield number, Refused("not JSON", f"{error.msg} at column {error.colno}")
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                yield number, Refused("not JSON", str(error))
                continue
            yield number, _row(value)


def _text(path: Path, documents: Documents) -> Rows:
    with path.open("rb") as file:
        start, held = 0, []
        for number, text in _lines(file, path):
            blank = not text or text.isspace()
            if documents == "line":
                if not blank:
                    yield number, {"text": text}
            elif documents == "paragraph" and blank:
                if held:
                    yield start, {"text": "\n".join(held)}
                held = []
            else:
                start = start if held else number
                held.append(text)
        if any(not (text.isspace() or not text) for text in held):
            yield start, {"text": "\n".join(held)}


def _csv(path: Path, delimiter: str) -> Rows:
    # The library's own limit of 131,072 characters a field is less than a long document.
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name or f"column {i}" for i, name in enumerate(next(reader, []), 1)]
            other = next((mark for mark in (";", "\t", "|") if mark in header[0]), None) if len(header) == 1 else None
            if other is not None:
                raise DataError(
                    f"{path}: the header is one field, {header[0]!r}: this file separates its fields with {other!r}, "
                    f"not {delimiter!r}; save it with commas as .csv, or with tabs as .tsv"
                )
            if len(set(header)) != len(header):
                raise DataError(f"{path}: two columns have the same name ({', '.join(header)})")
            number = 0
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if len(fields) != len(header):
                    detail = f"{len(fields)} fields, the header has {len(header)} (line {reader.line_num})"
                    yield number, Refused("wrong number of fields", detail)
                else:
                    yield number, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: not valid CSV near line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise _not_utf8(path, reader.line_num + 1, error) from None


# ---------------------------------------------------------------- read whole: a JSON array has no lines to stop at


def _json(path: Path) -> Rows:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from None
    del data
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):  # JSON lines under the name .json
            yield from _json_lines(path)
            return
        raise DataError(f"{path}: not valid JSON: {error}") from None
    del text
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        value = lists[0] if len(value) == 1 and lists else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of rows, found {describe(value)}")
    for number, item in enumerate(value, 1):
        yield number, _row(item)


# ---------------------------------------------------------------- columnar


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a columnar file with the absent keys of its inner objects absent. Such a column has one type, so each
    object is filled up with nulls for the keys of all others: every tool call would have every call's arguments."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_nulls(row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not valid Parquet: {error}") from None


def _arrow(path: Path) -> Rows:
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:  # the stream layout, which the datasets library writes
                file.seek(0)
                batches = ipc.open_stream(file)
            number = 0
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield number, without_nulls(row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not valid Arrow: {error}") from None
