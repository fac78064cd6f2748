"""Text: {"text": ...} for pretraining. A row of a txt file is {"text": ...} too (see Source.documents)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.data.formats import RowError, read_text
from tunery.types import Example

COLUMNS = {"text": ("text",)}


def detect(row: Mapping[str, Any]) -> bool:
    others = {"messages", "conversations", "instruction", "prompt", "question"}
    return isinstance(row.get("text"), str) and not others & row.keys()


def parse(row: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, str]) -> Example:
    text = read_text(row, columns.get("text", "text"), required=True)
    if not text.strip():
        raise RowError("empty text")
    return Example(text=text)
