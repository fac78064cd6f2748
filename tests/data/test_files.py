"""Reading files. Oracle: rows and row numbers as a person counts them, and the libraries that wrote the files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from tunery.data.files import read_file
from tunery.errors import DataError
from tunery.types import Refused

ROWS = [{"a": "one"}, {"a": 'zwei, "drei"\nvier'}, {"a": "五\u2028六 🙂"}]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def numbered(path: Path, **options) -> list[tuple[int, object]]:
    return list(read_file(path, **options))


def save(path: Path) -> Path:
    """ROWS in the kind of file that the name asks for."""
    if path.suffix == ".json":
        return write(path, json.dumps(ROWS, ensure_ascii=False))
    if path.suffix in (".jsonl", ".ndjson"):
        return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS))
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".arrow":
        new = ipc.new_stream if "stream" in path.name else ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["a"], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize(
    "name", ["x.json", "x.jsonl", "x.ndjson", "x.csv", "x.tsv", "x.parquet", "x.arrow", "stream.arrow"]
)
def test_every_kind_of_file_gives_the_same_rows_numbered_from_one(tmp_path, name):
    assert numbered(save(tmp_path / name)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_objects_of_columnar_files_lose_the_keys_that_only_others_have(tmp_path, name):
    rows = [{"calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": [None, 2]}}], "c": None}]
    table = pa.Table.from_pylist(rows)
    if name == "x.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert numbered(tmp_path / name) == [(1, {"calls": rows[0]["calls"], "c": None})]


def test_a_byte_order_mark_is_accepted(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert numbered(write(tmp_path / "x.jsonl", mark + b'{"a": 1}\n')) == [(1, {"a": 1})]
    assert numbered(write(tmp_path / "x.json", mark + b'[{"a": 1}]')) == [(1, {"a": 1})]
    assert numbered(write(tmp_path / "x.csv", mark + b"a\n1\n")) == [(1, {"a": "1"})]
    assert numbered(write(tmp_path / "x.txt", mark + b"hello")) == [(1, {"text": "hello"})]


def test_broken_lines_are_refused_with_their_line_number_and_the_others_are_read(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": \n[1, 2]\r\n"text"\nnull\n{"a": 2}\r\n')
    rows = numbered(path)
    assert [number for number, _ in rows] == [1, 3, 4, 5, 6, 7]
    assert rows[0][1] == {"a": 1} and rows[-1][1] == {"a": 2}
    reasons = [row.reason for _, row in rows if isinstance(row, Refused)]
    assert reasons == ["not JSON", "not an object", "not an object", "not an object"]
    details = [row.detail for _, row in rows if isinstance(row, Refused)]
    assert details[0] == "Expecting value at column 7"
    assert details[1:] == ["the row is a list", "the row is text", "the row is null"]


def test_a_json_file_may_be_lines_or_hold_its_rows_under_one_key(tmp_path):
    assert numbered(write(tmp_path / "lines.json", '{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    assert numbered(write(tmp_path / "key.json", '{"data": [{"a": 1}, 7]}'))[0] == (1, {"a": 1})
    assert numbered(write(tmp_path / "one.json", '{"a": 1, "b": []}')) == [(1, {"a": 1, "b": []})]
    (row,) = numbered(write(tmp_path / "mixed.json", "[7]"))
    assert row == (1, Refused("not an object", "the row is a number"))


def test_a_deeply_nested_line_is_refused_not_a_crash(tmp_path):
    (row,) = numbered(write(tmp_path / "x.jsonl", "[" * 200_000))
    assert isinstance(row[1], Refused) and row[1].reason == "not JSON"


def test_csv_rows_of_another_length_are_refused_and_long_fields_are_read(tmp_path):
    long = "x" * 200_000
    rows = numbered(write(tmp_path / "x.csv", f"a,b\n1,2\n3\n\n{long},4\n"))
    assert rows[0] == (1, {"a": "1", "b": "2"})
    assert isinstance(rows[1][1], Refused) and rows[1][1].reason == "wrong number of fields"
    assert rows[2] == (3, {"a": long, "b": "4"})


def test_a_csv_column_without_a_name_gets_one(tmp_path):
    assert numbered(write(tmp_path / "x.csv", ",a\n0,1\n")) == [(1, {"column 1": "0", "a": "1"})]


def test_documents_of_a_text_file(tmp_path):
    path = write(tmp_path / "x.txt", "one\ntwo\n\n \nthree\r\n")
    assert numbered(path) == [(1, {"text": "one"}), (2, {"text": "two"}), (5, {"text": "three"})]
    assert numbered(path, documents="paragraph") == [(1, {"text": "one\ntwo"}), (5, {"text": "three"})]
    assert numbered(path, documents="file") == [(1, {"text": "one\ntwo\n\n \nthree"})]


def test_lines_are_read_as_they_are_asked_for(tmp_path):
    """Oracle: a file whose second line is broken UTF-8 gives its first row before it raises."""
    rows = read_file(write(tmp_path / "x.jsonl", b'{"a": 1}\n\xff\n'))
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.json", b"", "the file is empty"),
        ("x.json", b"[]", "the file is empty .it holds no rows"),
        ("x.jsonl", b"\n\n", "the file is empty .it holds no rows"),
        ("x.csv", b"a,b\n", "it holds no rows"),
        ("x.txt", b" \n", "it holds no rows"),
        ("x.jsonl", '{"a": "\u4e2d"}'.encode("gb18030"), "line 1 is not UTF-8 .byte 0x.*iconv"),
        ("x.json", '[\n{"a": "\u4e2d"}]'.encode("gb18030"), "line 2 is not UTF-8"),
        ("x.csv", "a\n\u4e2d\n".encode("gb18030"), "is not UTF-8"),
        ("x.txt", "\u4e2d".encode("gb18030"), "line 1 is not UTF-8"),
        ("x.json", '[{"a": 1}]'.encode("utf-16"), "is UTF-16"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16"),
        ("x.json", b'[{"a": 1},\n{"a" 2}]', "not valid JSON: .*line 2 column 6"),
        ("x.json", b"7", "expected a list of rows, found a number"),
        ("x.csv", b'a\n"open', "not valid CSV near line 2"),
        ("x.csv", b"a,a\n1,2\n", "two columns have the same name"),
        ("x.parquet", b"nonsense", "not valid Parquet"),
        ("x.arrow", b"nonsense", "not valid Arrow"),
        ("x.xyz", b"?", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error_that_names_it(tmp_path, name, data, says):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=says) as caught:
        numbered(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        numbered(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match=r"folder .* does not exist either"):
        numbered(tmp_path / "nowhere" / "x.jsonl")


def test_a_file_of_another_name_is_not_suggested(tmp_path):
    write(tmp_path / "p8.jsonl", "{}")
    with pytest.raises(DataError, match=r"nope\.jsonl: no such file in "):
        numbered(tmp_path / "nope.jsonl")
    with pytest.raises(DataError, match=r"did you mean .*p8\.jsonl"):
        numbered(tmp_path / "p8.json")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_another_separator_in_a_csv_is_said(tmp_path, mark):
    path = write(tmp_path / "x.csv", f"instruction{mark}output\nHi, you{mark}Hello\n")
    with pytest.raises(
        DataError, match=r"the header is one field, .*save it with commas as \.csv, or with tabs as \.tsv"
    ):
        numbered(path)
