"""Generated text back to a message: reasoning, tool calls, and the rest as content.

Each function below knows one way of writing calls, and returns the text that is left and the calls it found. A call
that cannot be read stays in the content, as the model wrote it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from tunery.types import Message, ToolCall

# Special tokens that carry structure in an answer; any other special token in one is noise and is left out.
MARKERS = (
    "<think>", "</think>", "[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>",
    "<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>", "<tool_call>", "</tool_call>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>",
)  # fmt: skip
THOUGHTS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)  # fmt: skip

Found = tuple[str, list[ToolCall]]


def parse_answer(text: str, thinking: bool = False, bare_json: bool = False) -> Message:
    """The message in a generated text. `thinking`: the prompt has already opened the reasoning. `bare_json`: a call
    is a JSON object alone (Llama 3); elsewhere such an answer is just JSON."""
    if "<|channel|>" in text:
        return _harmony(text)
    reasoning, text = _reasoning(text, thinking)
    for read in (
        _hermes,
        _mistral,
        _deepseek,
        _kimi,
        _function_json,
        _python_tag,
        *([_bare_json] if bare_json else []),
    ):
        content, calls = read(text)
        if calls:
            return Message("assistant", content.strip(), tool_calls=tuple(calls), reasoning=reasoning)
    return Message("assistant", text, reasoning=reasoning)


def _reasoning(text: str, thinking: bool) -> tuple[str | None, str]:
    """What stands between the marks of thinking at the beginning (None if nothing does), and the text after it."""
    for first, last in THOUGHTS:
        opened = text.lstrip().startswith(first)
        if opened or (thinking and last in text):
            inside, closed, after = text.lstrip().removeprefix(first).partition(last)
            if not closed:  # cut off in the middle of its thoughts
                return inside.strip() or None, ""
            return inside.strip() or None, after.lstrip("\n")
    return None, text


def _call(value: Any, call_id: str | None = None) -> ToolCall | None:
    """{"name": ..., "arguments" or "parameters": {...}} as a call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    call_id = value.get("id", call_id)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], arguments, call_id if isinstance(call_id, str) else None)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _each(pattern: str, text: str, read: Callable[[re.Match[str]], ToolCall | None]) -> Found:
    """Every match that can be read, and the text without those."""
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = read(match)
        if call is None:
            return match.group()
        calls.append(call)
        return ""

    return re.sub(pattern, take, text, flags=re.DOTALL), calls


def _hermes(text: str) -> Found:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call> (Hermes, Qwen), or tags inside (Qwen Coder, GLM)."""

    def read(match: re.Match[str]) -> ToolCall | None:
        body = match.group(1).strip()
        return _call(_json(body)) or _function_tags(body) or _argument_tags(body, closed=bool(match.group(2)))

    return _each(r"<(?:seed:)?tool_call>(.*?)(</(?:seed:)?tool_call>|\Z)", text, read)


def _function_tags(body: str) -> ToolCall | None:
    """<function=NAME> <parameter=KEY> VALUE </parameter> ... </function>; a value is JSON where it can be."""
    function = re.fullmatch(r"<function=([^>\s]+)>(.*?)(?:</function>)?", body, flags=re.DOTALL)
    if function is None:
        return None
    pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", function.group(2), flags=re.DOTALL)
    return ToolCall(function.group(1), {key: _value(value) for key, value in pairs})


_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def _argument_tags(body: str, closed: bool) -> ToolCall | None:
    """NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ... A name alone is a call only where the call was
    `closed`: otherwise any word after the tag would be one."""
    name = re.match(r"([A-Za-z_][\w.-]*)\s*", body)
    if name is None:
        return None
    arguments, end = {}, name.end()
    while pair := _PAIR.match(body, end):
        arguments[pair.group(1)], end = _value(pair.group(2)), pair.end()
    return ToolCall(name.group(1), arguments) if end == len(body) and (arguments or closed) else None


def _value(text: str) -> Any:
    """An argument in a tag: JSON where it can be read so, else text."""
    parsed = _json(text)
    return text if parsed is None and text != "null" else parsed


def _mistral(text: str) -> Found:
    """[TOOL_CALLS] [{...}, ...], or [TOOL_CALLS]NAME[ARGS]{...} once per call (later tokenizers)."""
    content, marker, rest = text.partition("[TOOL_CALLS]")
    if not marker:
        return text, []
    listed = _json(rest.strip())
    if isinstance(listed, list):
        calls = [_call(item) for item in listed]
    else:
        calls = []
        for part in rest.split("[TOOL_CALLS]"):
            head, _, arguments = part.partition("[ARGS]")
            name, _, call_id = head.partition("[CALL_ID]")
            calls.append(_call({"name": name.strip(), "arguments": _json(arguments)}, call_id.strip() or None))
    read = [call for call in calls if call is not None]
    return (content, read) if len(read) == len(calls) else (text, [])


def _deepseek(text: str) -> Found:
    """Calls between DeepSeek's tokens: with a kind and a fenced block (R1, V3), or name and JSON alone (V3.1)."""

    def read(match: re.Match[str]) -> ToolCall | None:
        first, _, second = match.group(1).partition("<｜tool▁sep｜>")
        fenced = re.fullmatch(r"(.*?)\n```json\n(.*?)\n?```\s*", second, flags=re.DOTALL)
        name, arguments = fenced.groups() if fenced else (first, second)
        return _call({"name": name.strip(), "arguments": _json(arguments)})

    content, calls = _each(r"<｜tool▁call▁begin｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", text, read)
    return re.sub("<｜tool▁calls▁(?:begin|end)｜>", "", content), calls


def _kimi(text: str) -> Found:
    """<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|> (Kimi K2)."""

    def read(match: re.Match[str]) -> ToolCall | None:
        name = match.group(1).strip().removeprefix("functions.").rpartition(":")[0]
        return _call({"name": name, "arguments": _json(match.group(2)), "id": match.group(1).strip()}) if name else None

    pattern = r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|\Z)"
    return _each(pattern, text, read)


def _function_json(text: str) -> Found:
    """<function=NAME>{...}</function> (Functionary, Llama 3.1 with own instructions)."""

    def read(match: re.Match[str]) -> ToolCall | None:
        return _call({"name": match.group(1), "arguments": _json(match.group(2))})

    return _each(r"<function=([^>\s]+)>\s*(\{.*?\})\s*</function>", text, read)


def _python_tag(text: str) -> Found:
    """<|python_tag|> before a JSON call, or before name.call(key=value, ...) for built-in tools (Llama 3.1)."""
    content, marker, rest = text.partition("<|python_tag|>")
    if not marker:
        return text, []
    left, calls = _bare_json(rest)
    if calls and not left.strip():
        return content, calls
    builtin = re.fullmatch(r"(\w+)\.call\((.*)\)", rest.strip(), flags=re.DOTALL)
    if builtin is None:
        return text, []
    try:
        call = ast.parse(f"f({builtin.group(2)})", mode="eval").body
        assert isinstance(call, ast.Call)
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError):
        return text, []
    return content, [ToolCall(builtin.group(1), arguments)]


def _bare_json(text: str) -> Found:
    """The whole text is one call in JSON, or several with a semicolon between."""
    decoder = json.JSONDecoder()
    calls: list[ToolCall] = []
    rest = text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except ValueError:
            return text, []
        call = _call(value) if isinstance(value, dict) and ("parameters" in value or "arguments" in value) else None
        if call is None:
            return text, []
        calls.append(call)
        rest = rest[end:].lstrip(" \n;")
    return "", calls


def _harmony(text: str) -> Message:
    """gpt-oss: parts <|channel|>NAME to=functions.X<|message|>TEXT, with <|start|>assistant between them."""
    content, reasoning, calls = [], [], []
    for header, body in re.findall(r"([^<]*(?:<\|channel\|>|<\|constrain\|>|[^<])*?)<\|message\|>(.*?)(?=<\|end\|>|\Z)",
                                   text, flags=re.DOTALL):  # fmt: skip
        to = re.search(r"to=(?:functions\.)?([\w.-]+)", header)
        call = _call({"name": to.group(1), "arguments": _json(body)}) if to else None
        if call is not None:
            calls.append(call)
        elif "analysis" in header:
            reasoning.append(body)
        else:
            content.append(body)
    return Message(
        "assistant", "\n".join(content), tool_calls=tuple(calls), reasoning="\n".join(reasoning).strip() or None
    )
