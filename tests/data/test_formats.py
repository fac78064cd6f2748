"""Formats. Oracle: the Examples written out by hand from each format's public description."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets_path import assets
from tunery.config import kinds
from tunery.data.examples import check_example
from tunery.data.formats import RowError, alpaca, detect_format, load_format, openai, read_tools, sharegpt, text
from tunery.errors import ConfigError
from tunery.types import ROLES, Example, Message, ToolCall

WEATHER = {"name": "weather", "description": "Weather of a town", "parameters": {"type": "object"}}


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str, **more: object) -> Message:
    return Message("assistant", content, **more)  # type: ignore[arg-type]


def test_alpaca_joins_instruction_and_input_with_a_line_break():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert alpaca.parse(row, {}, {}) == Example(messages=[user("Add.\n1 2"), answer("3")])
    assert alpaca.parse({**row, "input": ""}, {}, {}).messages[0] == user("Add.")
    assert alpaca.parse({**row, "input": None}, {}, {}).messages[0] == user("Add.")


def test_alpaca_history_system_and_tools():
    row = {
        "instruction": "And now?",
        "output": "Four.",
        "system": "Count.",
        "history": [["One?", "Two."], ["Then?", "Three."]],
        "tools": json.dumps([WEATHER]),
    }
    example = alpaca.parse(row, {}, {})
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "Count."),
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Then?"),
        ("assistant", "Three."),
        ("user", "And now?"),
        ("assistant", "Four."),
    ]
    assert example.tools == [{"type": "function", "function": WEATHER}]


def test_alpaca_preference_pair_and_thumb():
    example = alpaca.parse({"instruction": "Hi", "chosen": "good", "rejected": "bad"}, {}, {})
    assert example.messages == [user("Hi"), answer("good")] and example.rejected == [answer("bad")]
    assert alpaca.parse({"instruction": "Hi", "output": "x", "kto_tag": False}, {}, {}).label is False


def test_alpaca_columns_are_mapped_and_an_empty_name_means_none():
    row = {"q": "Add.", "input": "never read", "a": "3"}
    example = alpaca.parse(row, {"prompt": "q", "query": "", "response": "a"}, {})
    assert example.messages == [user("Add."), answer("3")]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"instruction": "Hi"}, "missing column", "'output' is not in this row"),
        ({"instruction": "Hi", "output": None}, "missing column", "'output' is null"),
        ({"instruction": "Hi", "output": 3}, "wrong type", "'output' is a number, expected text"),
        ({"instruction": " ", "output": "x"}, "empty prompt", ""),
        ({"instruction": "Hi", "output": "x", "history": "no"}, "wrong type", "history is text"),
        ({"instruction": "Hi", "output": "x", "history": [["one"]]}, "wrong type", "a turn of history"),
        ({"instruction": "Hi", "chosen": "x"}, "half a preference pair", "only chosen"),
        ({"instruction": "Hi", "output": "x", "kto_tag": "yes"}, "wrong type", "'kto_tag' is text"),
        ({"instruction": "Hi", "output": "x", "tools": "{not json"}, "bad tools", "not JSON"),
    ],
)
def test_alpaca_refuses_bad_rows_with_the_reason(row: dict, reason: str, detail: str):
    with pytest.raises(RowError) as caught:
        alpaca.parse(row, {}, {})
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_sharegpt_speakers_and_tool_turns():
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Rome"}}'},
            {"from": "observation", "value": '{"rain": false}'},
            {"from": "gpt", "value": "No."},
        ],
        "system": "Be short.",
        "tools": json.dumps([WEATHER]),
    }
    example = sharegpt.parse(row, {}, {})
    assert example.messages == [
        Message("system", "Be short."),
        user("Rain?"),
        answer("", tool_calls=(ToolCall("weather", {"town": "Rome"}),)),
        Message("tool", '{"rain": false}'),
        answer("No."),
    ]
    assert example.tools == [{"type": "function", "function": WEATHER}]


def test_sharegpt_tags_rename_keys_and_speakers():
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "client", "assistant_tag": "clerk"}
    row = {"talk": [{"who": "client", "says": "Hi"}, {"who": "clerk", "says": "Yes?"}]}
    assert sharegpt.parse(row, {"messages": "talk"}, tags).messages == [user("Hi"), answer("Yes?")]
    with pytest.raises(RowError, match="unknown role"):  # a renamed speaker loses its usual name
        sharegpt.parse({"talk": [{"who": "human", "says": "Hi"}]}, {"messages": "talk"}, tags)


def test_sharegpt_turns_need_not_alternate():
    turns = [("gpt", "Hello!"), ("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    roles = [message.role for message in sharegpt.parse(row, {}, {}).messages]
    assert roles == ["assistant", "user", "user", "assistant", "assistant"]


def test_sharegpt_preference_pair_says_where_it_begins():
    row = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    example = sharegpt.parse(row, {}, {})
    assert example.messages == [user("Hi"), answer("good")]
    assert example.rejected == [answer("bad")] and example.meta == {"shared": 1}
    with pytest.raises(RowError, match="same answers"):
        sharegpt.parse({**row, "rejected": row["chosen"]}, {}, {})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "missing column"),
        ("text", "wrong type"),
        ([], "no messages"),
        (["Hi"], "wrong type"),
        ([{"from": "martian", "value": "Hi"}], "unknown role"),
        ([{"from": "human"}], "missing column"),
        ([{"from": "human", "value": ["Hi"]}], "wrong type"),
        ([{"from": "function_call", "value": "weather()"}], "bad tool call"),
        ([{"from": "function_call", "value": '{"arguments": {}}'}], "bad tool call"),
        ([{"from": "function_call", "value": "[]"}], "bad tool call"),
    ],
)
def test_sharegpt_refuses_bad_rows_with_the_reason(turns: object, reason: str):
    with pytest.raises(RowError) as caught:
        sharegpt.parse({"conversations": turns}, {}, {})
    assert caught.value.reason == reason


def test_openai_messages_with_calls_results_and_weights():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "Rain?", "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "no", "tool_call_id": "c1"},
            {"role": "assistant", "content": "No.", "weight": 0.5, "reasoning_content": "It is dry."},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    }
    example = openai.parse(row, {}, {})
    assert example.messages == [
        Message("system", "Be short."),
        Message("user", "Rain?", name="Ann"),
        answer("", tool_calls=(ToolCall("weather", {"town": "Rome"}, "c1"),), weight=0.0),
        Message("tool", "no", tool_call_id="c1"),
        answer("No.", weight=0.5, reasoning="It is dry."),
    ]
    assert example.tools == [{"type": "function", "function": WEATHER}]


def test_openai_arguments_may_be_an_object_and_the_call_may_be_legacy():
    rows = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
    ]
    for row in rows:
        assert openai.parse({"messages": [row]}, {}, {}).messages[0].tool_calls == (ToolCall("f", {"a": 1}),)


def test_openai_content_in_parts():
    parts = [
        {"type": "reasoning", "value": "Think."},
        {"type": "text", "text": "One "},
        {"type": "text", "value": "two"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    message = openai.parse({"messages": [{"role": "assistant", "content": parts}]}, {}, {}).messages[0]
    assert message == answer("One two", reasoning="Think.", tool_calls=(ToolCall("f", {}),))
    image = [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "What?"}]
    example = openai.parse({"messages": [{"role": "user", "content": image}]}, {}, {})
    assert example.media == [{"type": "image", "value": {"url": "x.png"}}]


def test_openai_prompt_and_completion_as_text_or_messages():
    assert openai.parse({"prompt": "Hi", "completion": "Yo"}, {}, {}).messages == [user("Hi"), answer("Yo")]
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]}
    assert openai.parse(row, {}, {}).messages == [user("Hi"), answer("Yo")]
    assert openai.parse({**row, "label": True}, {}, {}).label is True


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {
            "prompt": turns(("user", "Hi")),
            "chosen": turns(("assistant", "good")),
            "rejected": turns(("assistant", "bad")),
        },
        {
            "chosen": turns(("user", "Hi"), ("assistant", "good")),
            "rejected": turns(("user", "Hi"), ("assistant", "bad")),
        },
        {
            "prompt": "Hi",
            "messages": turns(("user", "Hi"), ("assistant", "good")),
            "chosen": turns(("user", "Hi"), ("assistant", "good")),
            "rejected": turns(("user", "Hi"), ("assistant", "bad")),
        },
        {
            "input": {"messages": turns(("user", "Hi")), "tools": [], "parallel_tool_calls": True},
            "preferred_output": turns(("assistant", "good")),
            "non_preferred_output": turns(("assistant", "bad")),
        },
        {
            "chosen_messages": turns(("user", "Hi"), ("assistant", "good")),
            "rejected_messages": turns(("user", "Hi"), ("assistant", "bad")),
        },
    ],
)
def test_openai_preference_lines_of_every_shape_mean_the_same(row: dict):
    example = openai.parse(row, {}, {})
    assert example.messages == [user("Hi"), answer("good")]
    assert example.rejected == [answer("bad")] and example.meta == {"shared": 1}
    assert detect_format([row]) == "openai"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": 3}, "wrong type"),
        ({"messages": ["Hi"]}, "wrong type"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "unknown role"),
        ({"messages": [{"role": "user"}]}, "wrong type"),
        ({"messages": [{"role": "user", "content": 3}]}, "wrong type"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": -1}]}, "bad weight"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": True}]}, "bad weight"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": float("nan")}]}, "bad weight"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "bad tool call"),
        ({"messages": [{"role": "user", "content": [{"type": "smell", "value": 1}]}]}, "bad content part"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "bad content part"),
        ({"prompt": "Hi", "chosen": "x"}, "half a preference pair"),
        ({"prompt": "Hi", "chosen": "x", "rejected": "x"}, "same answers"),
    ],
)
def test_openai_refuses_bad_rows_with_the_reason(row: dict, reason: str):
    with pytest.raises(RowError) as caught:
        openai.parse(row, {}, {})
    assert caught.value.reason == reason


def test_openai_preference_lines_under_other_names():
    asked = {"messages": turns(("user", "Hi")), "tools": [WEATHER]}
    row = {"question": asked, "good": turns(("assistant", "good")), "bad": turns(("assistant", "bad"))}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert detect_format([row], columns) == "openai"
    example = openai.parse(row, columns, {})
    assert (example.messages, example.rejected) == ([user("Hi"), answer("good")], [answer("bad")])
    assert example.tools == [{"type": "function", "function": WEATHER}]


PAIRS = {
    "alpaca": {"instruction": "Hi", "chosen": "good", "rejected": "bad"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}], "chosen": "good", "rejected": "bad"},
    "openai": {"prompt": "Hi", "chosen": "good", "rejected": "bad", "system": "Be kind."},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pairs_margin_is_a_number_and_thumbs_of_a_table_are_words(name: str):
    module, row = load_format(name), PAIRS[name]
    assert module.parse({**row, "margin": 2}, {}, {}).meta["margin"] == 2.0
    assert module.parse({**row, "margin": "0.5"}, {}, {}).meta["margin"] == 0.5
    assert module.parse({**row, "gap": -1.5}, {"margin": "gap"}, {}).meta["margin"] == -1.5
    for none in (row, {**row, "margin": None}, {**row, "margin": ""}):
        assert "margin" not in module.parse(none, {}, {}).meta
    for bad in ("wide", True, [1], float("nan"), float("inf")):
        with pytest.raises(RowError) as caught:
            module.parse({**row, "margin": bad}, {}, {})
        assert caught.value.reason == "bad margin" and "expected a number" in caught.value.detail
        assert "margin" not in module.parse({**row, "margin": bad}, {"margin": ""}, {}).meta
    label = module.COLUMNS["label"][0]
    said = [module.parse({**row, label: word}, {}, {}).label for word in ("True", "false", "", None)]
    assert said == [True, False, None, None]


def test_text_is_taken_whole():
    assert text.parse({"text": " a\nb "}, {}, {}) == Example(text=" a\nb ")
    assert text.parse({"body": "a"}, {"text": "body"}, {}).text == "a"
    with pytest.raises(RowError, match="empty text"):
        text.parse({"text": " \n"}, {}, {})


def test_a_bare_tool_is_wrapped_and_none_is_none():
    assert read_tools([WEATHER]) == read_tools(json.dumps(WEATHER)) == [{"type": "function", "function": WEATHER}]
    assert read_tools([json.dumps(WEATHER)]) == [{"type": "function", "function": WEATHER}]
    assert read_tools("") is read_tools("[]") is read_tools(None) is None
    with pytest.raises(RowError, match="without a name"):
        read_tools([{"description": "?"}])


ROWS = {
    "alpaca": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "context": "c", "response": "b", "category": "x"},
        {"question": "a", "answer": "b"},
        {"prompt": "a", "response": "b"},
        {"instruction": "a", "chosen": "b", "rejected": "c"},
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}]}],
    "openai": [
        {"messages": turns(("user", "a"))},
        {"conversations": turns(("user", "a"))},
        {"prompt": "a", "completion": "b"},
    ],
    "text": [{"text": "a"}, {"text": "a", "url": "b"}],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in ROWS.items() for row in rows])
def test_each_row_is_recognised_by_one_format_alone(name: str, row: dict):
    assert [kind for kind in kinds("data.formats") if load_format(kind).detect(row)] == [name]


def test_rows_of_no_format_are_not_guessed():
    assert detect_format([{"a": 1}, {"b": "x"}]) is None
    assert detect_format([]) is None


def test_an_unknown_format_names_the_nearest_and_a_dotted_one_is_imported(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        load_format("alpacca")
    (tmp_path / "my_formats.py").write_text(
        "from tunery.types import Example\nCOLUMNS = {'text': ('t',)}\n"
        "def detect(row): return False\n"
        "def parse(row, columns, tags): return Example(text=row[columns['text']])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import 'my_formats.x'"):
        load_format("my_formats.x")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "my_formats.py").rename(tmp_path / "pkg" / "mine.py")
    assert load_format("pkg.mine").parse({"t": "a"}, {"text": "t"}, {}) == Example(text="a")


@pytest.mark.parametrize(
    ("file", "name", "rows"),
    [
        ("alpaca/alpaca_data.json", "alpaca", 52002),
        ("dolly/databricks-dolly-15k.jsonl", "alpaca", 15011),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("llamafactory/dpo_zh_demo.json", "sharegpt", 300),
        ("llamafactory/kto_en_demo.json", "openai", 300),
        ("llamafactory/reason_tool_use_demo_50.jsonl", "openai", 50),
        ("llamafactory/v1_dpo_demo.jsonl", "openai", 10),
        ("llamafactory/c4_demo.jsonl", "text", 300),
    ],
)
def test_real_files_parse_to_the_last_row(file: str, name: str, rows: int):
    """Oracle: the number of rows that the files' own pages state, every one of them readable."""
    from tunery.data.examples import read_examples
    from tunery.data.report import SourceReport
    from tunery.data.sources import Source, locate

    report = SourceReport("data.train[0]", file)
    parsed = list(read_examples(locate(Source(path=str(assets() / "datasets" / file))), report))
    assert report.format == name and len(parsed) == rows
    assert all(isinstance(example, Example) for _, _, example in parsed)


KEYS = "role content from value weight type text function name arguments tool_calls function_call id".split()  # noqa: SIM905
FIELDS = "content value weight tool_calls function_call name tool_call_id reasoning_content".split()  # noqa: SIM905
PLAIN = st.sampled_from([None, True, False, 2, -1.5, float("nan"), "", "a", "{}", "[1]"])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "from": st.sampled_from(["human", "function_call"])},
    optional=dict.fromkeys(FIELDS, VALUES),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_row_makes_a_format_crash(data):
    """Oracle: the contract. Any JSON gives an Example whose texts are text, or a RowError."""
    module = data.draw(st.sampled_from([alpaca, sharegpt, openai, text]))
    names = [name for usual in module.COLUMNS.values() for name in usual]
    row = data.draw(st.dictionaries(st.sampled_from([*names, "input", "preferred_output"]), VALUES, max_size=5))
    if "messages" in module.COLUMNS:
        row[module.COLUMNS["messages"][0]] = data.draw(st.lists(TURN, max_size=3))
    module.detect(row)
    try:
        example = module.parse(row, {}, {})
    except RowError as error:
        assert error.reason
        return
    for message in [*example.messages, *(example.rejected or [])]:
        assert message.role in ROLES and isinstance(message.content, str)
        for value in (message.name, message.tool_call_id, message.reasoning):
            assert value is None or isinstance(value, str)
    check_example(example) if example.messages or example.text else None


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": "b"}, {"type": "image_url", "image_url": {"url": "b"}}]
)
def test_a_message_of_a_picture_alone_is_a_row_with_media(part):
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]}
    example = openai.parse(row, {}, {})
    assert example.media == [{"type": "image", "value": part["image_url"]}] and example.messages[0].content == ""
