"""A conversation that is too long, made to fit: what is cut, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunery.types import Message

Fits = Callable[[list[Message]], bool]


def shorten(messages: Sequence[Message], fits: Fits) -> list[Message] | None:
    """The conversation cut until `fits`, or None when that cannot be done.

    System messages and the last answer always stay. What goes, in this order: turns after the last answer, the oldest
    rounds (a round begins with a user's message), the middle of the longest user and tool texts, and last the end of
    the longest answers. The template is rendered again afterwards, so headers and end-of-turn tokens stay whole."""
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    head = [message for message in messages[: last + 1] if message.role == "system"]
    body = [message for message in messages[: last + 1] if message.role != "system"]
    starts = [i for i, message in enumerate(body) if i and message.role == "user"]
    starts = [0, *starts]
    dropped = _least(len(starts) - 1, lambda n: fits(head + body[starts[n] :]))
    if dropped is not None:
        return head + body[starts[dropped] :]
    kept = head + body[starts[-1] :]
    for answers, cut in ((False, _without_middle), (True, _without_end)):
        places = [i for i, m in enumerate(kept) if m.role != "system" and (m.role == "assistant") is answers]
        for i in sorted(places, key=lambda i: -len(kept[i].content)):
            text = kept[i].content

            def shortened(n: int, i: int = i, kept: list[Message] = kept, cut=cut) -> list[Message]:
                return [*kept[:i], _said_less(kept[i], cut(kept[i].content, n)), *kept[i + 1 :]]

            gone = _least(len(text) - 1, lambda n, shortened=shortened: fits(shortened(n)))
            if gone is not None:
                return shortened(gone)
            kept = shortened(max(len(text) - 1, 0))
    return None


def _least(most: int, good: Callable[[int], bool]) -> int | None:
    """The smallest n in 0..most for which `good` holds (it is taken to stay so from there on), or None."""
    if most < 0 or not good(most):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _said_less(message: Message, content: str) -> Message:
    """The message with less content; spans of an answer, which loses its end, end where it does."""
    spans = [replace(s, end=min(s.end, len(content))) if s.field == "content" else s for s in message.spans]
    return replace(message, content=content, spans=tuple(s for s in spans if s.start < s.end))


def _without_middle(text: str, n: int) -> str:
    """The text without n characters: instructions tend to stand at the beginning, questions at the end."""
    keep = len(text) - n
    return text[: (keep + 1) // 2] + text[len(text) - keep // 2 :]


def _without_end(text: str, n: int) -> str:
    return text[: len(text) - n]
