"""OpenAI: {"messages": [{"role", "content", ...}], "tools": [...]}, and its relatives:

    prompt + completion            text or messages each; or a prompt alone, whose answers will be generated
    prompt + chosen + rejected     text or messages each; prompt may be left out where chosen and rejected hold it
    input + preferred_output + non_preferred_output          the preference lines of OpenAI's fine-tuning API
    chosen_messages + rejected_messages                      two whole conversations with the same start

A message has role (system, developer, user, assistant, tool, function), content (text, null beside tool calls, or a
list of parts of type text, reasoning, tool_call, image_url, ...), and may have tool_calls, function_call,
tool_call_id, name, reasoning_content, and weight (or loss_weight): what its loss is multiplied by, 0 to not train it.
The text and reasoning parts of an assistant's content may have a weight each, which multiplies the message's.
A pair may have a margin, by how much the chosen answer is better. Its meta["shared"] is the number of messages before
the first chosen turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunery.data.formats import (
    RowError,
    describe,
    read_call,
    read_calls,
    read_flag,
    read_margin,
    read_media,
    read_text,
    read_tools,
    shared_prefix,
)
from tunery.types import Example, Message, Span, ToolCall

COLUMNS = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "input"),
    "response": ("completion",),
    "system": ("system",),
    "tools": ("tools", "functions"),
    "chosen": ("chosen", "chosen_messages", "preferred_output"),
    "rejected": ("rejected", "rejected_messages", "non_preferred_output"),
    "margin": ("margin",),
    "label": ("label", "kto_tag"),
    "images": ("images",),
    "videos": ("videos",),
    "audios": ("audios",),
}

ANSWERS = ("output", "response", "answer")  # beside a prompt they are alpaca's
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def detect(row: Mapping[str, Any]) -> bool:
    for name in COLUMNS["messages"]:
        if _is_messages(row.get(name)):
            return True
    if "instruction" in row:
        return False
    if _is_messages(row.get("chosen_messages")) or ("preferred_output" in row and isinstance(row.get("input"), dict)):
        return True
    if "chosen" in row and "rejected" in row:
        return "prompt" in row or _is_messages(row["chosen"])
    return "prompt" in row and ("completion" in row or not any(isinstance(row.get(name), str) for name in ANSWERS))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def parse(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Example:
    def name(column: str) -> str:
        if column in columns:
            return columns[column]
        return next((usual for usual in COLUMNS[column] if usual in row), COLUMNS[column][0])

    chosen, rejected = row.get(name("chosen")), row.get(name("rejected"))
    if (chosen is None) != (rejected is None):
        raise RowError("half a preference pair", f"only {'rejected' if chosen is None else 'chosen'} is there")
    media = read_media(row, columns) or []
    messages = _turns(row.get(name("messages")), "user", media) if row.get(name("messages")) is not None else []
    asked, tools = row.get(name("prompt")), row.get(name("tools"))
    if isinstance(asked, dict) and "messages" in asked:  # what OpenAI's preference lines have as input
        asked, tools = asked["messages"], asked.get("tools", tools)
    if not messages and asked is not None:
        messages = _turns(asked, "user", media)
    worse, meta = None, {}
    if chosen is not None:
        better, worse = _turns(chosen, "assistant", media), _turns(rejected, "assistant", media)
        start = shared_prefix(better, worse)
        if better[: len(messages)] == messages:  # chosen repeats the prompt
            messages = []
        messages = messages + better[:start]
        meta = {"shared": len(messages), **read_margin(row, name("margin"))}
        messages, worse = messages + better[start:], worse[start:]
        if not worse:
            raise RowError("same answers", "chosen and rejected are the same, or one is the start of the other")
    elif row.get(name("response")) is not None:
        messages = messages + _turns(row[name("response")], "assistant", media)
    if not messages:
        raise RowError("no messages", f"{name('messages')!r} is missing or empty")
    system = read_text(row, name("system"))
    if system and messages[0] != Message("system", system):
        messages.insert(0, Message("system", system))
        meta = {**meta, "shared": meta["shared"] + 1} if meta else meta
    return Example(
        messages=messages,
        rejected=worse,
        label=read_flag(row, name("label")),
        tools=read_tools(tools),
        media=media or None,
        meta=meta,
    )


def _turns(value: Any, role: str, media: list[Any]) -> list[Message]:
    """Messages from a list of them, from one, or from bare text spoken by `role`."""
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError("wrong type", f"messages are {describe(value)}, expected a list")
    return [_message(item, media) for item in value]


def _message(item: Any, media: list[Any]) -> Message:
    if not isinstance(item, dict):
        raise RowError("wrong type", f"a message is {describe(item)}, expected an object with role and content")
    given = item.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError("unknown role", f"{given!r} (known: {', '.join(ROLES)})")
    content = item.get("content")
    reasoning = item.get("reasoning_content") or item.get("reasoning") or item.get("thinking")
    calls = _calls(item.get("tool_calls"))
    if isinstance(item.get("function_call"), dict):
        calls.append(read_call(item["function_call"]))
    spans: list[Span] = []
    if isinstance(content, list):
        spans = _spans(content, role)
        content, thought, written = _parts(content, media)
        if reasoning and thought:
            raise RowError("bad content part", "a part of type reasoning, and reasoning_content beside the content")
        reasoning, calls = reasoning or thought, calls + written
    if content is None and (calls or reasoning):
        content = ""
    if not isinstance(content, str):
        raise RowError("wrong type", f"the content of a message ({given}) is {describe(content)}, expected text")
    for what, value in (("reasoning", reasoning), *((key, item.get(key)) for key in ("tool_call_id", "name"))):
        if value is not None and not isinstance(value, str):
            raise RowError("wrong type", f"the {what} of a message is {describe(value)}, expected text")
    return Message(
        role,
        content,
        weight=_weight(item),
        tool_calls=tuple(calls),
        tool_call_id=item.get("tool_call_id"),
        name=item.get("name"),
        reasoning=reasoning,
        spans=tuple(spans),
    )


def _calls(value: Any) -> list[ToolCall]:
    """The calls of a message: a list, or JSON text of one."""
    if isinstance(value, str):
        return list(read_calls(value)) if value.strip() else []
    if value is not None and not isinstance(value, list):
        raise RowError("bad tool call", f"tool_calls is {describe(value)}, expected a list")
    return [read_call(call) for call in value or ()]


def _weight(item: Mapping[str, Any]) -> float | None:
    """The weight of a message, or of a part of its content."""
    value = item.get("weight", item.get("loss_weight"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowError("bad weight", f"{value!r}, expected a number of 0 or more")
    return float(value)


FIELDS = {"text": "content", "input_text": "content", "output_text": "content"} | {
    "reasoning": "reasoning", "thinking": "reasoning",
}  # fmt: skip


def _part(part: Any) -> tuple[str, Any]:
    """(type, value) of a part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RowError("bad content part", f"{describe(part)}, expected an object with a type")
    return kind, next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), None)


def _spans(parts: list[Any], role: str) -> list[Span]:
    """The parts with weights of their own, as spans of what `_parts` makes of all."""
    spans, length = [], {"content": 0, "reasoning": 0}
    for part in parts:
        kind, value = _part(part)
        field, weight = FIELDS.get(kind), _weight(part)
        if weight is not None and role != "assistant":
            raise RowError("bad weight", f"a part of a {role} message has one, and only an assistant's is trained")
        if weight is not None and field is None:
            raise RowError("bad weight", f"a part of type {kind} has one; it can be given for text and reasoning")
        if field is None or not isinstance(value, str):
            continue
        start, length[field] = length[field], length[field] + len(value)
        if weight is not None and value:
            spans.append(Span(start, length[field], weight, field))
    return spans


def _parts(parts: list[Any], media: list[Any]) -> tuple[str | None, str | None, list[Any]]:
    """(text, reasoning, tool calls) of a content given in parts; images and the like are added to `media`."""
    texts, thoughts, calls, seen = [], [], [], False
    for part in parts:
        kind, value = _part(part)
        if kind in FIELDS:
            (texts if FIELDS[kind] == "content" else thoughts).append(value)
        elif kind == "tool_call":
            calls += read_calls(value) if isinstance(value, str) else [read_call(value)]
        elif kind.removesuffix("_url") in ("image", "video", "audio", "input_audio"):
            seen = True
            media.append({"type": kind.removesuffix("_url").removeprefix("input_"), "value": value})
        else:
            raise RowError("bad content part", f"unknown type {kind!r}")
    if not all(isinstance(text, str) for text in [*texts, *thoughts]):
        raise RowError("bad content part", "the text of a part is not text")
    if not texts and seen:  # a message of pictures alone says nothing, which is not the same as no content
        texts.append("")
    return "".join(texts) if texts else None, "".join(thoughts) if thoughts else None, calls
