"""Loss weights of parts of an answer: from characters of a message to tokens of a rendered conversation.

A template may trim, move or take apart what it is given. So it is given the message a second time, with the boundaries
of its weighted parts written into it, and the place of each is read off where it comes out. What comes out otherwise
changed is not guessed at."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunery.data.render import RowRefused
from tunery.types import Message

BOUNDARY = {"content": "\ufdd2", "reasoning": "\ufdd3"}  # noncharacters, beside those of shadow.py
_BOUNDARIES = re.compile("([" + "".join(BOUNDARY.values()) + "])")

Weighted = tuple[int, int, float]  # characters from, to (the first one after), and what their weight is multiplied by


def bounded(message: Message) -> Message:
    """The message with a boundary at both ends of each span. Raises RowRefused where its text holds one already."""
    texts = {name: getattr(message, name) or "" for name in BOUNDARY}
    if any(_BOUNDARIES.search(text) for text in texts.values()):
        raise RowRefused("reserved characters", "the text holds the noncharacters U+FDD2 or U+FDD3")
    for name, text in texts.items():
        places = _boundaries(message, name)
        if places:
            pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
            message = replace(message, **{name: BOUNDARY[name].join(pieces)})
    return message


def _boundaries(message: Message, name: str) -> list[int]:
    """Where the spans of a field begin and end. Not within the space around its text, which a template may trim; so
    none where it is nothing but space."""
    text = getattr(message, name) or ""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    ends = {end for span in message.spans if span.field == name for end in (span.start, span.end)}
    return sorted({min(max(end, first), last) for end in ends}) if first < last else []


def found_again(message: Message, written: str, expected: str) -> list[Weighted] | None:
    """The spans of a message in the text that holds it: `written` from the message with its boundaries, `expected`
    from the message itself. None where the two differ in more than boundaries, or these do not come once each and in
    order."""
    pieces = _BOUNDARIES.split(written)
    if "".join(pieces[::2]) != expected:
        return None
    ends = list(itertools.accumulate(map(len, pieces[::2])))
    found: list[Weighted] = []
    for name, boundary in BOUNDARY.items():
        there = [end for end, mark in zip(ends, pieces[1::2], strict=False) if mark == boundary]
        given = _boundaries(message, name)
        if len(there) != len(given):
            return None
        place = dict(zip(given, there, strict=True))
        for span in (span for span in message.spans if given and span.field == name):
            start, end = (min(max(at, given[0]), given[-1]) for at in (span.start, span.end))
            if start < end:
                said = getattr(message, name)
                before = _alike(said[span.start : start][::-1], expected[: place[start]][::-1])
                after = _alike(said[end : span.end], expected[place[end] :])
                found.append((place[start] - before, place[end] + after, span.weight))
    return found


def _alike(space: str, text: str) -> int:
    """How much of the space at the beginning or end of a message has been written."""
    return next((i for i, letter in enumerate(space) if text[i : i + 1] != letter), len(space))


def factors(text: str, offsets: Sequence[tuple[int, int]], spans: Sequence[Weighted]) -> np.ndarray:
    """What each token's weight is multiplied by, float32 [tokens]: that of its characters, 1 outside of all spans.

    Space does not count beside other characters, since the space before a word is part of the word's token; where the
    others are of several spans, the largest counts. `offsets`: the (start, end) characters of each token."""
    of_character = np.ones(len(text), dtype=np.float32)
    for start, end, weight in spans:
        of_character[start:end] = weight
    made = np.ones(len(offsets), dtype=np.float32)
    before = 0
    for i, (start, end) in enumerate(offsets):
        if start == end:  # some tokenizers take the space of a token of space for no character
            start = min(before, start)
        before = end
        values = of_character[start:end]
        said = [not letter.isspace() for letter in text[start:end]]
        if len(values):
            made[i] = values[said].max() if any(said) else values.max()
    return made
