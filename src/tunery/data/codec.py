"""Text to tokens where special tokens come from the template alone.

A chat template writes its special tokens as text (`<|im_end|>`), so the same letters in a user's message would become
the token too. Rows with such look-alikes take a second road: their strings are marked before rendering, and a shadow of
the tokenizer, whose control tokens have other names, encodes the text. Then what the template wrote is renamed and
matches, and what a person wrote is text like any other, with the merges and prefix spaces that text has there."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from tunery.data.parse import MARKERS
from tunery.data.render import RowRefused
from tunery.data.shadow import CLOSE, OPEN, Shadow
from tunery.data.words import WordEncoder, word_encoder
from tunery.errors import TemplateError

_RENAMED = re.compile(f"{OPEN}[^{CLOSE}]*{CLOSE}")


class Codec:
    """The tokenizer as a template uses it. `literals`: the strings the template can write.

    Control tokens are the special tokens, the added tokens that the template writes, and those that swallow spaces
    beside them (as text they would lose them). In an assistant's turn only special ones count: `<think>` and
    `<tool_call>` are what the model is to write."""

    def __init__(self, tokenizer: Any, literals: str):
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; save it with a tokenizer.json "
                "(transformers' AutoTokenizer converts most) and use that folder"
            )
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        if self.backend.truncation or self.backend.padding or self.backend.encode_special_tokens:
            # Settings of a tokenizer.json that transformers overrides in each call; here in a copy.
            self.backend = Tokenizer.from_str(self.backend.to_str())
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = False
        self.eos: str | None = tokenizer.eos_token
        added = self.backend.get_added_tokens_decoder()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)}
        visible = {token.content: i for i, token in added.items() if token.content.strip()}
        swallows = {token.content for token in added.values() if token.lstrip or token.rstrip}
        self.generated = tuple(text for text in visible if text in special or text in swallows)
        self.control = tuple(text for text in visible if text in self.generated or text in literals)
        self.ids = {text: visible[text] for text in self.control}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any control token; the longest where one begins another."""
        return _any_of(self.control)

    @cached_property
    def generated_pattern(self) -> re.Pattern[str]:
        """Any control token that an assistant's text may not hold."""
        return _any_of(self.generated)

    @cached_property
    def hints(self) -> tuple[str, ...]:
        """Two-letter beginnings of the control tokens: a text without any of them has no look-alike."""
        return tuple(sorted({text[:2] for text in self.control}))

    def encode(self, texts: Sequence[str], shadow: bool = False) -> list[list[int]]:
        """Token ids of rendered texts: without look-alikes, or (`shadow`) from `rename`."""
        if shadow:
            return self._shadow.encode(texts)
        if self._words is None:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        result = [self._words.encode(text) for text in texts]
        others = [i for i, ids in enumerate(result) if ids is None]
        if others:
            encodings = self.backend.encode_batch_fast([texts[i] for i in others], add_special_tokens=False)
            for i, encoding in zip(others, encodings, strict=True):
                result[i] = encoding.ids
        return [ids for ids in result if ids is not None]

    @cached_property
    def _shadow(self) -> Shadow:
        return Shadow(self.backend, self.ids)

    @cached_property
    def _words(self) -> WordEncoder | None:
        return word_encoder(self.backend)

    def encode_mixed(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Token ids of (text, shadow) pairs, in order."""
        result: list[list[int]] = [[]] * len(texts)
        for shadow in (False, True):
            places = [i for i, (_, is_shadow) in enumerate(texts) if is_shadow is shadow]
            if places:
                for i, ids in zip(places, self.encode([texts[i][0] for i in places], shadow), strict=True):
                    result[i] = ids
        return result

    def offsets(self, text: str, shadow: bool) -> list[tuple[int, int]]:
        """The (start, end) characters of each token of a text."""
        if shadow:
            return self._shadow.offsets(text)
        return self.backend.encode(text, add_special_tokens=False).offsets

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of raw text, with what the tokenizer itself puts around a document (its BOS)."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        around = self.backend.encode("a", add_special_tokens=True).ids
        at = next((i for i in range(len(around)) if around[i : i + len(bare)] == bare), None)
        if at is None:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=True)]
        before, after = around[:at], around[at + len(bare) :]
        return [before + ids + after for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Exact text of token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens that carry no structure. It is decoded after a letter:
        at the beginning of a text some tokenizers leave out a space."""
        ids = [i for i in ids if i not in self._noise]
        return self.decode([*self._letter, *ids]).removeprefix(self.decode(self._letter))

    @cached_property
    def _noise(self) -> frozenset[int]:
        special = (t for t in self.backend.get_added_tokens_decoder().items() if t[1].special)
        return frozenset(i for i, token in special if token.content not in MARKERS)

    @cached_property
    def _letter(self) -> list[int]:
        return self.encode(["a"])[0]

    def controls(self, text: str, shadow: bool, start: int = 0) -> Iterator[re.Match[str]]:
        """The control tokens in a rendered (shadow: renamed) text."""
        return (_RENAMED if shadow else self.pattern).finditer(text, start)

    def id_of(self, control: str, shadow: bool) -> int:
        """Token id of a control token as it stands in a rendered (shadow: renamed) text."""
        return self.ids[control.strip(OPEN + CLOSE) if shadow else control]

    def last_control(self, text: str, shadow: bool) -> re.Match[str] | None:
        """The last control token in a rendered (shadow: renamed) text."""
        return next(iter(collections.deque(self.controls(text, shadow), maxlen=1)), None)

    def mark(self, value: Any, assistant: bool = False) -> Any:
        """The value with every look-alike in its strings enclosed, ready to be rendered; dictionary keys are left."""
        if isinstance(value, str):
            if OPEN in value or CLOSE in value:
                raise RowRefused("reserved characters", "the text holds the noncharacters U+FDD0 or U+FDD1")
            return (self.generated_pattern if assistant else self.pattern).sub(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, dict):
            assistant = assistant or value.get("role") == "assistant"
            return {k: v if k == "role" else self.mark(v, assistant) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, assistant) for item in value]
        return value

    def rename(self, text: str) -> str:
        """A text rendered from marked values: the template's control tokens renamed, the marks around look-alikes
        gone (a template may have cut between them, so a lone mark goes as well)."""
        pieces = re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}", text)
        for i in range(0, len(pieces), 2):
            ours = re.sub(f"[{OPEN}{CLOSE}]", "", pieces[i])
            pieces[i] = self.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", ours)
        return "".join(pieces)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")
