"""Alpaca: {"instruction", "input", "output"} and the like, one prompt and one answer in a row.

prompt (+ "\n" + query where there is one) -> response
history: [[user, assistant], ...], earlier turns;   system: text;   tools: a list, or JSON text of one
chosen and rejected in place of response: a preference pair, with margin, by how much the chosen one is better
label: true or false, a thumb (KTO)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.data.formats import RowError, describe, read_flag, read_margin, read_media, read_text, read_tools
from tunery.types import Example, Message

COLUMNS = {
    "prompt": ("instruction", "prompt", "question"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer"),
    "history": ("history",),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "label": ("kto_tag",),
    "images": ("images",),
    "videos": ("videos",),
    "audios": ("audios",),
}


def detect(row: Mapping[str, Any]) -> bool:
    def has(column: str) -> bool:
        return any(isinstance(row.get(name), str) for name in COLUMNS[column])

    if isinstance(row.get("prompt"), str) and not isinstance(row.get("instruction"), str):
        return has("response") and "completion" not in row and "chosen" not in row
    return has("prompt") and (has("response") or (has("chosen") and has("rejected")))


def parse(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Example:
    prompt = read_text(row, columns.get("prompt", "instruction"), required=True)
    query = read_text(row, columns.get("query", "input"))
    if query:
        prompt = f"{prompt}\n{query}" if prompt else query
    if not prompt.strip():
        raise RowError("empty prompt")
    messages: list[Message] = []
    system = read_text(row, columns.get("system", "system"))
    if system:
        messages.append(Message("system", system))
    history = row.get(columns.get("history", "history"))
    if history:
        messages += _history(history)
    messages.append(Message("user", prompt))

    chosen, rejected = row.get(columns.get("chosen", "chosen")), row.get(columns.get("rejected", "rejected"))
    if (chosen is None) != (rejected is None):
        raise RowError("half a preference pair", f"only {'rejected' if chosen is None else 'chosen'} is there")
    worse, meta = None, {}
    if chosen is None:
        answer = read_text(row, columns.get("response", "output"), required=True)
    else:
        answer = read_text(row, columns.get("chosen", "chosen"), required=True)
        worse = [Message("assistant", read_text(row, columns.get("rejected", "rejected"), required=True))]
        meta = read_margin(row, columns.get("margin", "margin"))
    messages.append(Message("assistant", answer))
    return Example(
        messages=messages,
        rejected=worse,
        label=read_flag(row, columns.get("label", "kto_tag")),
        tools=read_tools(row.get(columns.get("tools", "tools"))),
        media=read_media(row, columns),
        meta=meta,
    )


def _history(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong type", f"history is {describe(value)}, expected a list of [user, assistant] pairs")
    messages = []
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise RowError("wrong type", "a turn of history is not a [user, assistant] pair of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages
