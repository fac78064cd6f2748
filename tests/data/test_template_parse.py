"""Generated text back to messages. Oracle: the call formats as model cards show them, written out by hand."""

from __future__ import annotations

import pytest

from tunery.data.parse import parse_answer
from tunery.types import Message, ToolCall

PARIS = ToolCall("get_weather", {"city": "Paris"})
ROME = ToolCall("get_weather", {"city": "Rome", "days": 2})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
        (
            'Two:\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}</tool_call>',
            "Two:",
            [PARIS, ROME],
        ),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
        (
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            [ROME],
        ),
        (
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>2</arg_value>\n</tool_call>",
            "",
            [ROME],
        ),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        ('<|python_tag|>get_weather.call(city="Rome", days=2)', "", [ROME]),
        (
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]',
            "",
            [ToolCall("get_weather", {"city": "Paris"}, "abcdefghi")],
        ),
        (
            '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}'
            '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome", "days": 2}',
            "",
            [ToolCall("get_weather", {"city": "Paris"}, "abcdefghi"), ROME],
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "",
            [PARIS],
        ),
        ('<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>', "", [PARIS]),
        ('<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
        (
            '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>',
            "",
            [ToolCall("get_weather", {"city": "Paris"}, "functions.get_weather:0")],
        ),
    ],
)
def test_calls(text, content, calls):
    assert parse_answer(text) == Message("assistant", content, tool_calls=tuple(calls))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  Plain text, kept as it is.\n",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '[TOOL_CALLS] [{"name": "f"',
        "[TOOL_CALLS]f[ARGS]{oops",
        "<|python_tag|>print('hello')",
        "<|python_tag|>f.call(x=open('y'))",
        "<function=f>{oops}</function>",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
    ],
)
def test_what_cannot_be_read_stays_content(text):
    assert parse_answer(text) == Message("assistant", text)


def test_one_unreadable_call_among_others_stays():
    text = '<tool_call>{oops}</tool_call><tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert parse_answer(text) == Message("assistant", "<tool_call>{oops}</tool_call>", tool_calls=(PARIS,))


def test_bare_json_is_a_call_only_where_the_template_says_so():
    text = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
    assert parse_answer(text, bare_json=True).tool_calls == (PARIS,)
    assert parse_answer(f"{text}; {text}", bare_json=True).tool_calls == (PARIS, PARIS)
    for other in ('{"name": "Bob", "age": 3}', f"Sure: {text}", "[1, 2]", "{"):
        assert parse_answer(other, bare_json=True) == Message("assistant", other)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, None, "Yes."),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", False, None, "Hm.\n</think>\n\nYes."),
        ("<think>\nHm, and so on", False, "Hm, and so on", ""),
        ("[THINK]Hm.[/THINK]Yes.", False, "Hm.", "Yes."),
        ("Say <think> twice.", False, None, "Say <think> twice."),
        ("No thoughts.", True, None, "No thoughts."),
    ],
)
def test_reasoning(text, thinking, reasoning, content):
    assert parse_answer(text, thinking=thinking) == Message("assistant", content, reasoning=reasoning)


def test_reasoning_before_a_call():
    text = (
        '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    )
    assert parse_answer(text) == Message("assistant", "", tool_calls=(PARIS,), reasoning="Hm.")


def test_harmony():
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}'
    )
    assert parse_answer(text) == Message("assistant", "", tool_calls=(PARIS,), reasoning="Hm.")
    assert parse_answer("<|channel|>final<|message|>Yes, 1 < 2.") == Message("assistant", "Yes, 1 < 2.")


@pytest.mark.parametrize(
    "text",
    [
        "a <tool_call> x",
        "a <tool_call>.",
        "a <tool_call>. </tool_call>",
        "<tool_call>two words</tool_call>",
        "<tool_call>f<arg_key>a</arg_key> and no value</tool_call>",
    ],
)
def test_a_word_after_the_tag_is_no_call(text):
    assert parse_answer(text) == Message("assistant", text)


def test_a_call_without_arguments_is_one_when_closed():
    assert parse_answer("<tool_call>now\n</tool_call>").tool_calls == (ToolCall("now", {}),)
    open_call = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    assert parse_answer(open_call).tool_calls == (PARIS,)
