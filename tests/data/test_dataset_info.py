"""LLaMA-Factory's dataset_info.json. Oracle: its documented meaning, and its own demo files with their row counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from assets_path import assets
from tunery.data.examples import read_examples
from tunery.data.report import SourceReport
from tunery.data.sources import Source, locate
from tunery.errors import ConfigError, DataError
from tunery.types import Example, Message, Refused


def info(folder: Path, entry: dict, rows: list[dict] | None = None) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    if rows is not None:
        (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def read(folder: Path, **options) -> list[Example | Refused]:
    source = Source(**{"path": "mine", **options})
    located = locate(source, "data.train[0]", str(folder))
    return [example for _, _, example in read_examples(located, SourceReport("data.train[0]", "mine"))]


FILE = {"file_name": "rows.json"}


def contents(example: Example | Refused) -> list[str]:
    assert isinstance(example, Example), example
    return [message.content for message in example.messages]


def test_an_entry_without_columns_is_plain_alpaca(tmp_path):
    info(tmp_path, FILE, [{"instruction": "a", "input": "b", "output": "c", "system": "not named, so not read"}])
    assert contents(read(tmp_path)[0]) == ["a\nb", "c"]


def test_columns_not_named_are_not_read(tmp_path):
    entry = {**FILE, "columns": {"prompt": "q", "response": "r", "system": "s", "history": "h"}}
    info(tmp_path, entry, [{"q": "a", "input": "no", "r": "c", "s": "sys", "h": [["x", "y"]]}])
    assert contents(read(tmp_path)[0]) == ["sys", "x", "y", "a", "c"]


def test_rows_with_only_a_prompt_are_for_pretraining(tmp_path):
    info(tmp_path, {**FILE, "columns": {"prompt": "text"}}, [{"text": "a"}])
    (example,) = read(tmp_path)
    assert isinstance(example, Example) and example.text == "a" and not example.messages


def test_ranking_and_thumbs(tmp_path):
    entry = {**FILE, "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}
    info(tmp_path, entry, [{"q": "a", "good": "b", "bad": "c"}])
    (example,) = read(tmp_path)
    assert contents(example) == ["a", "b"]
    assert isinstance(example, Example) and example.rejected == [Message("assistant", "c")]
    entry = {**FILE, "columns": {"prompt": "q", "response": "r", "kto_tag": "ok"}}
    info(tmp_path, entry, [{"q": "a", "r": "b", "ok": False}])
    (example,) = read(tmp_path)
    assert isinstance(example, Example) and example.label is False


def test_sharegpt_with_tags_and_openai(tmp_path):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for entry in (
        {**FILE, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags},
        {**FILE, "formatting": "openai", "columns": {"messages": "messages"}, "tags": tags},
        {**FILE, "formatting": "openai"},
    ):
        info(tmp_path, entry, rows)
        assert contents(read(tmp_path)[0]) == ["a", "b"]
    other = [{"messages": [{"who": "user", "content": "a"}, {"who": "assistant", "content": "b"}]}]
    info(tmp_path, {**FILE, "formatting": "openai", "tags": {**tags, "role_tag": "who"}}, other)
    assert contents(read(tmp_path)[0]) == ["a", "b"]


def test_num_samples_counts_unless_the_configuration_says_otherwise(tmp_path):
    rows = [{"instruction": str(i), "output": "x"} for i in range(5)]
    info(tmp_path, {**FILE, "num_samples": 2}, rows)
    assert len(read(tmp_path)) == 2
    assert len(read(tmp_path, samples=3)) == 3
    info(tmp_path, {**FILE, "columns": {"prompt": "output", "response": "instruction"}}, rows)
    assert contents(read(tmp_path)[1]) == ["x", "1"]
    assert contents(read(tmp_path, columns={"prompt": "instruction", "response": "output"})[1]) == ["1", "x"]


def test_a_hub_entry_keeps_its_subset_split_and_folder(tmp_path):
    entry = {"hf_hub_url": "owner/name", "ms_hub_url": "other/name", "subset": "en", "split": "full", "folder": "data"}
    located = locate(Source(path="mine"), "data.train[0]", str(info(tmp_path, entry)))
    assert (located.hub, located.hub_folder) == ("owner/name", "data")
    assert (located.source.subset, located.source.split) == ("en", "full")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"script_url": "x.py"}, "'mine' comes from script_url"),
        ({"ms_hub_url": "a/b"}, "'mine' comes from ms_hub_url .ModelScope"),
        ({"om_hub_url": "a/b"}, "'mine' comes from om_hub_url"),
        ({"cloud_file_name": "s3://x"}, "'mine' comes from cloud_file_name"),
        ({"columns": {}}, "'mine' has neither file_name nor hf_hub_url"),
        ({**FILE, "shuffle": True}, "'mine' has the key 'shuffle', which Tunery does not know"),
        ({**FILE, "formatting": "chatml"}, "formatting 'chatml' is unknown"),
        ({"file_name": "gone.json"}, "the file .*gone.json does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, entry, says):
    info(tmp_path, entry, [])
    with pytest.raises((ConfigError, DataError), match=says):
        locate(Source(path="mine"), "data.train[0]", str(tmp_path))


def test_a_wrong_name_or_folder_says_what_there_is(tmp_path):
    info(tmp_path, FILE)
    with pytest.raises(ConfigError, match=r"'mime' is not in .*did you mean 'mine'"):
        locate(Source(path="mime"), "data.train[0]", str(tmp_path))
    with pytest.raises(ConfigError, match=r"dataset_info.json does not exist"):
        locate(Source(path="mine"), "data.train[0]", str(tmp_path / "nowhere"))
    (tmp_path / "dataset_info.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        locate(Source(path="mine"), "data.train[0]", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "rows", "what"),
    [
        ("identity", 91, "answers"),
        ("alpaca_zh_demo", 1000, "answers"),
        ("glaive_toolcall_en_demo", 300, "tools"),
        ("dpo_en_demo", 300, "pairs"),
        ("kto_en_demo", 300, "thumbs"),
        ("mllm_demo", 6, "media"),
        ("wiki_demo", 30, "text"),
        ("c4_demo", 300, "text"),
    ],
)
def test_its_own_demo_sets_are_read_to_the_last_row(name, rows, what):
    folder = assets() / "datasets" / "llamafactory"
    located = locate(Source(path=name), "data.train[0]", str(folder))
    examples = [e for _, _, e in read_examples(located, SourceReport("data.train[0]", name)) if isinstance(e, Example)]
    assert len(examples) == rows
    has = {
        "answers": lambda e: e.messages[-1].role == "assistant",
        "tools": lambda e: e.tools is None or e.tools[0]["type"] == "function",
        "pairs": lambda e: e.rejected is not None,
        "thumbs": lambda e: e.label is not None,
        "media": lambda e: e.media,
        "text": lambda e: e.text,
    }[what]
    assert all(has(example) for example in examples)
    if what == "tools":
        assert any(message.tool_calls for example in examples for message in example.messages)


def test_ranking_without_pairs_is_named(tmp_path):
    entry = {**FILE, "ranking": True}
    info(tmp_path, entry, [{"instruction": "a", "output": "c"}])
    with pytest.raises(ConfigError, match=r"'mine': ranking is true, but no row has both 'chosen' and 'rejected'"):
        read(tmp_path)
    info(tmp_path, entry, [{"instruction": "a", "chosen": "c", "rejected": "d"}])
    (example,) = read(tmp_path)
    assert contents(example) == ["a", "c"] and isinstance(example, Example) and example.rejected
