"""Finding data. Oracle: the paths and rows put there; for hub names the datasets library on a local folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunery.data.examples import choose_columns, read_examples
from tunery.data.report import SourceReport
from tunery.data.sources import Located, Source, load_hub, locate, read_rows
from tunery.errors import ConfigError, DataError
from tunery.types import Example, Refused


def lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca(*texts: str) -> list[dict]:
    return [{"instruction": text, "input": "", "output": text.upper()} for text in texts]


def read(source: Source, **options) -> list[tuple[str, int, Example | Refused]]:
    return list(read_examples(locate(source, **options), SourceReport("data.train[0]", source.path)))


def test_a_folder_is_all_its_data_files_in_order(tmp_path):
    lines(tmp_path / "b.jsonl", alpaca("two"))
    lines(tmp_path / "a" / "deep.jsonl", alpaca("one"))
    lines(tmp_path / ".hidden" / "x.jsonl", alpaca("no"))
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "dataset_info.json").write_text("{}")
    found = locate(Source(path=str(tmp_path)))
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == ["a/deep.jsonl", "b.jsonl"]
    assert [row["instruction"] for _, _, row in read_rows(found) if isinstance(row, dict)] == ["one", "two"]


def test_a_folder_of_several_splits_must_be_told_which(tmp_path):
    for name in ("train", "test", "validation"):
        lines(tmp_path / f"{name}-00000.jsonl", alpaca(name))
    with pytest.raises(
        DataError, match=r"several splits .test, train, validation.; say which with data.train\[0\].split"
    ):
        locate(Source(path=str(tmp_path)), "data.train[0]")
    for split, name in (("train", "train"), ("test", "test"), ("dev", "validation")):
        assert [file.name for file in locate(Source(path=str(tmp_path), split=split)).files] == [f"{name}-00000.jsonl"]
    with pytest.raises(DataError, match=r"no file .* is of split 'other'"):
        locate(Source(path=str(tmp_path), split="other"))


def test_an_empty_folder_and_an_unknown_kind_of_file_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        locate(Source(path=str(tmp_path)))
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        locate(Source(path=str(tmp_path / "x.docx")))


def test_options_that_would_do_nothing_are_refused(tmp_path):
    path = str(lines(tmp_path / "x.jsonl", alpaca("a")))
    with pytest.raises(ConfigError, match="split is for hub data sets and folders"):
        locate(Source(path=path, split="train"))
    with pytest.raises(ConfigError, match="subset is for hub data sets"):
        locate(Source(path=path, subset="en"))
    with pytest.raises(ConfigError, match="revision is for hub data sets"):
        locate(Source(path=path, revision="main"))
    with pytest.raises(ConfigError, match=r"data.train\[0\].tags.role_tag: format alpaca does not know .*it has none"):
        read(Source(path=path, tags={"role_tag": "who"}), key="data.train[0]")


def test_a_missing_path_names_the_nearest_and_does_not_ask_the_hub(tmp_path, monkeypatch):
    lines(tmp_path / "data" / "train.jsonl", alpaca("a"))
    monkeypatch.chdir(tmp_path)
    for wrong in ("data/trian.jsonl", "data/trian"):
        with pytest.raises(DataError, match=r"did you mean data/train\.jsonl"):
            locate(Source(path=wrong))
    with pytest.raises(DataError, match="no such file"):
        locate(Source(path="oneword"))
    assert locate(Source(path="owner/name")).hub == "owner/name"


def test_samples_takes_the_first_rows_usable_or_not(tmp_path):
    first = lines(tmp_path / "a.jsonl", [*alpaca("one"), {"instruction": "x"}])
    lines(tmp_path / "b.jsonl", alpaca("two", "three"))
    rows = read(Source(path=str(tmp_path), samples=3))
    assert [(Path(file).name, row) for file, row, _ in rows] == [("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 1)]
    assert isinstance(rows[1][2], Refused) and rows[0][0] == str(first)


def test_examples_know_where_they_came_from(tmp_path):
    path = lines(tmp_path / "x.jsonl", [None, *alpaca("one")])
    (_, bad), (_, good) = [(row, example) for _, row, example in read(Source(path=str(path)))]
    assert isinstance(bad, Refused) and isinstance(good, Example)
    assert good.meta == {"file": str(path), "row": 2}


def test_columns_are_found_under_usual_names_or_as_given(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"question": "a", "context": "b", "answer": "c", "id": 1}])
    report = SourceReport("data.train[0]", "x")
    ((_, _, example),) = read_examples(locate(Source(path=str(path))), report)
    assert isinstance(example, Example) and [m.content for m in example.messages] == ["a\nb", "c"]
    assert report.columns["prompt"] == "question" and report.unread == ["id"]
    given = Source(path=str(path), format="alpaca", columns={"prompt": "answer", "query": "", "response": "question"})
    ((_, _, example),) = read(given)
    assert isinstance(example, Example) and [m.content for m in example.messages] == ["c", "a"]


def test_wrong_columns_and_formats_name_the_nearest(tmp_path):
    path = str(lines(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}]))
    with pytest.raises(
        ConfigError, match=r"columns.prompt: no row of .* has a column 'questoin'; did you mean 'question'"
    ):
        read(Source(path=path, format="alpaca", columns={"prompt": "questoin"}))
    with pytest.raises(
        ConfigError, match=r"columns.promt: format alpaca does not know this name; did you mean 'prompt'"
    ):
        read(Source(path=path, columns={"promt": "question"}))
    with pytest.raises(ConfigError, match="unknown kind 'alpacca'; did you mean 'alpaca'"):
        read(Source(path=path, format="alpacca"))
    with pytest.raises(DataError, match=r"no format fits .*'x', 'y'.*Name one with format: .alpaca, openai"):
        read(Source(path=str(lines(tmp_path / "y.jsonl", [{"x": 1, "y": 2}]))))


def test_a_given_column_is_not_taken_for_another():
    known = {"prompt": ("instruction", "prompt"), "response": ("output", "prompt")}
    columns = choose_columns(known, {"response": "prompt"}, [{"prompt": "a"}])
    assert columns == {"prompt": "instruction", "response": "prompt"}


def test_broken_unicode_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": "a", "output": "\\ud83d"}\n{"instruction": "a", "output": "\\ud83d\\ude42"}\n')
    (_, _, bad), (_, _, good) = read(Source(path=str(path)))
    assert isinstance(bad, Refused) and bad.reason == "invalid Unicode" and "ud83d" in bad.detail
    assert isinstance(good, Example) and good.messages[1].content == "🙂"


# ---------------------------------------------------------------- hub names, by the real library, on a local folder


def test_hub_rows_come_from_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    lines(folder / "train.jsonl", alpaca("one", "two"))
    lines(folder / "test.jsonl", alpaca("three"))
    located = Located(Source(path="owner/name"), "data.train[0]", hub=str(folder))
    for streaming in (False, True):
        rows = list(read_rows(located, streaming))
        assert [(file, row) for file, row, _ in rows] == [(f"{folder}:train", 1), (f"{folder}:train", 2)]
        assert [row["instruction"] for _, _, row in rows if isinstance(row, dict)] == ["one", "two"]
    test = Located(Source(path="owner/name", split="test"), "data.train[0]", hub=str(folder))
    assert [row["output"] for _, _, row in read_rows(test) if isinstance(row, dict)] == ["THREE"]
    with pytest.raises(DataError, match="neither a file or folder here nor a data set the hub gave us"):
        load_hub(Located(Source(path="owner/name", split="other"), "data.train[0]", hub=str(folder)))


def test_a_column_that_only_later_rows_have_is_no_error(tmp_path):
    rows = alpaca(*map(str, range(150))) + [{"instruction": "a", "output": "b", "sys": "c"}]
    path = str(lines(tmp_path / "x.jsonl", rows))
    *_, (_, _, last) = read(Source(path=path, columns={"system": "sys"}))
    assert isinstance(last, Example) and last.messages[0].content == "c"


def test_the_format_is_chosen_by_the_first_readable_row(tmp_path):
    path = str(lines(tmp_path / "x.jsonl", [None] * 250 + alpaca("a")))
    *bad, (_, row, last) = read(Source(path=path))
    assert len(bad) == 250 and row == 251 and isinstance(last, Example)


def test_an_unknown_format_names_its_place(tmp_path):
    path = lines(tmp_path / "x.jsonl", alpaca("a"))
    with pytest.raises(ConfigError, match=r"data\.train\[1\]\.format: .*'alpacca'; did you mean 'alpaca'"):
        locate(Source(path=str(path), format="alpacca"), "data.train[1]")


def test_columns_say_the_format(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"q": "Hi", "a": "Hello"}])
    report = SourceReport("data.train[0]", "x")
    ((_, _, example),) = read_examples(locate(Source(path=str(path), columns={"prompt": "q", "response": "a"})), report)
    assert report.format == "alpaca" and isinstance(example, Example)
    assert [message.content for message in example.messages] == ["Hi", "Hello"]
    path = lines(tmp_path / "y.jsonl", [{"body": "Hi"}])
    ((_, _, example),) = read(Source(path=str(path), columns={"text": "body"}))
    assert isinstance(example, Example) and example.text == "Hi"
    path = lines(tmp_path / "z.jsonl", [{"chat": [{"role": "user", "content": "Hi"}], "note": "n"}])
    ((_, _, example),) = read(Source(path=str(path), columns={"messages": "chat"}))
    assert isinstance(example, Example) and example.messages[0].content == "Hi"


def test_a_mapped_column_that_is_not_there_is_named_before_the_format(tmp_path):
    path = lines(tmp_path / "x.jsonl", [{"question_": "Hi", "a": "Hello"}])
    with pytest.raises(
        ConfigError, match=r"columns\.prompt: no row of .* has a column 'question'; did you mean 'question_'"
    ):
        read(Source(path=str(path), columns={"prompt": "question", "response": "a"}))
