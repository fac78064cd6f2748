"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}], "system", "tools"}.

The speakers human and user, gpt and assistant, system, function_call (JSON text of the calls), observation and tool.
Tags rename them as in dataset_info.json: role_tag ("from"), content_tag ("value"), user_tag ("human"), assistant_tag
("gpt"), observation_tag ("observation"), function_tag ("function_call"), system_tag ("system").
A preference pair has the better and the worse turn in chosen and rejected, and may have a margin; label is
true or false, a thumb (KTO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.data.formats import (
    RowError,
    describe,
    read_calls,
    read_flag,
    read_margin,
    read_media,
    read_text,
    read_tools,
)
from tunery.types import Example, Message

COLUMNS = {
    "messages": ("conversations", "conversation", "messages"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "label": ("label", "kto_tag"),
    "images": ("images",),
    "videos": ("videos",),
    "audios": ("audios",),
}

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}

# What each tag means, and the other usual words for it.
SPEAKERS = {
    "user_tag": ("user", ("human", "user")),
    "assistant_tag": ("assistant", ("gpt", "assistant", "chatgpt")),
    "observation_tag": ("tool", ("observation", "tool", "function_response")),
    "function_tag": ("call", ("function_call",)),
    "system_tag": ("system", ("system",)),
}


def detect(row: Mapping[str, Any]) -> bool:
    for name in COLUMNS["messages"]:
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return TAGS["role_tag"] in turns[0] and TAGS["content_tag"] in turns[0]
    return False


def parse(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Example:
    def name(column: str) -> str:
        return columns.get(column, COLUMNS[column][0])

    speakers = _speakers(tags)
    turns = row.get(name("messages"))
    if not isinstance(turns, list):
        raise RowError(*_absent(row, name("messages")))
    messages = [_message(turn, tags, speakers) for turn in turns]
    system = read_text(row, name("system"))
    if system and messages[:1] != [Message("system", system)]:
        messages.insert(0, Message("system", system))
    chosen, rejected = row.get(name("chosen")), row.get(name("rejected"))
    if (chosen is None) != (rejected is None):
        raise RowError("half a preference pair", f"only {'rejected' if chosen is None else 'chosen'} is there")
    worse, meta = None, {}
    if chosen is not None:
        meta = {"shared": len(messages), **read_margin(row, name("margin"))}
        messages += _answer(chosen, tags, speakers)
        worse = _answer(rejected, tags, speakers)
        if messages[meta["shared"] :] == worse:
            raise RowError("same answers", "chosen and rejected are the same")
    if not messages:
        raise RowError("no messages", f"{name('messages')!r} is empty")
    return Example(
        messages=messages,
        rejected=worse,
        label=read_flag(row, name("label")),
        tools=read_tools(row.get(name("tools"))),
        media=read_media(row, columns),
        meta=meta,
    )


def _absent(row: Mapping[str, Any], column: str) -> tuple[str, str]:
    if row.get(column) is None:
        return "missing column", f"{column!r} is {'null' if column in row else 'not in this row'}"
    return "wrong type", f"{column!r} is {describe(row[column])}, expected a list of turns"


def _speakers(tags: Mapping[str, str]) -> dict[str, str]:
    """The words of the data -> our role, or "call"."""
    speakers: dict[str, str] = {}
    for tag, (role, usual) in SPEAKERS.items():
        for word in (tags[tag],) if tags.get(tag) else usual:
            speakers[word] = role
    return speakers


def _answer(value: Any, tags: Mapping[str, str], speakers: Mapping[str, str]) -> list[Message]:
    """The turn, the turns, or the bare text of one side of a preference pair."""
    if isinstance(value, str):
        return [Message("assistant", value)]
    return [_message(turn, tags, speakers) for turn in (value if isinstance(value, list) else [value])]


def _message(turn: Any, tags: Mapping[str, str], speakers: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong type", f"a turn is {describe(turn)}, expected an object")
    role_key = tags.get("role_tag") or TAGS["role_tag"]
    given = turn.get(role_key)
    role = speakers.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError("unknown role", f"{role_key!r} is {given!r} (known: {', '.join(speakers)})")
    content = read_text(turn, tags.get("content_tag") or TAGS["content_tag"], required=True)
    if role == "call":
        return Message("assistant", "", tool_calls=read_calls(content))
    return Message(role, content)
