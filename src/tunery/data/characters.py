"""What a tokenizer cannot write. One without bytes has no tokens for characters outside its vocabulary: they become
`<unk>`, or nothing at all, and a model trained so learns answers with holes."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tunery.data.report import Noted
from tunery.errors import TemplateError
from tunery.types import Example, Message, Refused

MOST = 0.5  # lost, of what is trained: a row above this would teach something else than it says
_SHOWN = 8
# No vocabulary has tokens of its own for private-use characters: only bytes can write them.
_PRIVATE = "".join(map(chr, range(0xE000, 0xE040))) + "\U000f0000\U0010fffd"
_PLAIN = ("The quick test 123", "你好世界", "Привет мир", "नमस्ते दुनिया", "مرحبا بالعالم", "สวัสดี")


def check_vocabulary(tokenizer: Any) -> None:
    """Raises TemplateError for a tokenizer to which all plain text is unknown: its folder holds no vocabulary."""
    if not getattr(tokenizer, "is_fast", False):
        return
    for text in _PLAIN:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if any(i != tokenizer.unk_token_id for i in ids):
            return
    raise TemplateError(
        f"{tokenizer.name_or_path or 'the tokenizer'}: the tokenizer has no vocabulary ({len(tokenizer)} tokens, and "
        f"{_PLAIN[0]!r} is nothing but unknown ones); its folder lacks a tokenizer.json or tokenizer.model"
    )


class Writer:
    """A tokenizer, asked which of a text's characters its tokens give back."""

    def __init__(self, tokenizer: Any):
        self.backend = tokenizer.backend_tokenizer
        self.unknown: int | None = tokenizer.unk_token_id

    @cached_property
    def complete(self) -> bool:
        """Whether it writes every character, through bytes."""
        return self.lost([_PRIVATE]) == [Counter()]

    def lost(self, texts: Sequence[str]) -> list[Counter[str]]:
        """The characters of each text that its tokens do not give back, and how often; spaces do not count."""
        result = []
        for text, encoding in zip(texts, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True):
            kept = [i for i in encoding.ids if i != self.unknown]
            result.append(_missing(text, self.backend.decode(kept, skip_special_tokens=False)))
        return result

    def judge(self, examples: Sequence[Example]) -> list[Refused | list[Noted]]:
        """What each example loses: Refused where that is most of what is trained, else remarks, if any."""
        texts: list[str] = []
        places: list[tuple[slice, slice]] = []
        for example in examples:
            trained, shown = _texts(example)
            middle, end = len(texts) + len(trained), len(texts) + len(trained) + len(shown)
            places.append((slice(len(texts), middle), slice(middle, end)))
            texts += [*trained, *shown]
        lost = self.lost(texts)
        return [
            _judged(texts[trained], lost[trained], lost[shown], example.text is not None)
            for example, (trained, shown) in zip(examples, places, strict=True)
        ]


def _judged(
    trained: Sequence[str], lost: Sequence[Counter[str]], lost_shown: Sequence[Counter[str]], plain: bool
) -> Refused | list[Noted]:
    answers, prompts = sum(lost, Counter()), sum(lost_shown, Counter())
    if answers and answers.total() > MOST * sum(map(len, ("".join(text.split()) for text in trained))):
        return Refused("characters the tokenizer lacks", _named(answers))
    noted = []
    if answers:
        what = "text is" if plain else "answers are"
        noted.append(Noted(f"rows whose {what} trained without characters that the tokenizer lacks", _named(answers)))
    if prompts:
        noted.append(Noted("rows whose prompts lose characters that the tokenizer lacks", _named(prompts)))
    return noted


def _missing(text: str, back: str) -> Counter[str]:
    """The characters of a text but spaces that are not in what came back. One that came back in another normal form is
    there: tokenizers choose their own."""
    lost = Counter(text.replace(" ", "")) - Counter(back)
    if not lost or text.isascii():
        return lost
    folded = Counter(unicodedata.normalize("NFKC", text)) - Counter(unicodedata.normalize("NFKC", back))
    return Counter(
        {letter: n for letter, n in lost.items() if set(unicodedata.normalize("NFKC", letter)) & set(folded)}
    )


def _named(lost: Counter[str]) -> str:
    return " ".join(repr(letter)[1:-1] for letter in list(lost)[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")


def _texts(example: Example) -> tuple[list[str], list[str]]:
    """The texts that are trained, and those that are only shown."""
    if example.text is not None:
        return [example.text], []
    trained, shown = [], []
    for message in [*example.messages, *(example.rejected or ())]:
        answer = message.role == "assistant" and message.weight != 0
        (trained if answer else shown).extend(_said(message))
    return trained, shown


def _said(message: Message) -> list[str]:
    calls = [json.dumps([call.name, call.arguments], ensure_ascii=False) for call in message.tool_calls]
    return [text for text in (message.content, message.reasoning, *calls) if text]
