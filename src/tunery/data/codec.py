"""Text to tokens where special tokens come from the template alone.

A chat template writes its special tokens as text (`<|im_end|>`), so the same letters in a user's message would become
the token too. Rows with such look-alikes take a second road: their strings are marked before rendering, and a shadow of
the tokenizer, whose control tokens have other names, encodes the text. Then what the template wrote is renamed and
matches, and what a person wrote is text like any other, with the merges and prefix spaces that text has there."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tunery.data.parse import MARKERS
from tunery.data.render import RowRefused
from tunery.data.words import WordEncoder, word_encoder
from tunery.errors import TemplateError

# Two noncharacters: Unicode sets them aside for a program's own use, so they are in no text meant for interchange.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
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
        if shadow or self._words is None:
            backend = self.shadow if shadow else self.backend
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        result = [self._words.encode(text) if text.isascii() else None for text in texts]
        others = [i for i, ids in enumerate(result) if ids is None]
        if others:
            encodings = self.backend.encode_batch_fast([texts[i] for i in others], add_special_tokens=False)
            for i, encoding in zip(others, encodings, strict=True):
                result[i] = encoding.ids
        return [ids for ids in result if ids is not None]

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
        return (self.shadow if shadow else self.backend).encode(text, add_special_tokens=False).offsets

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

    @cached_property
    def shadow(self) -> Tokenizer:
        """The same tokenizer with every control token renamed to OPEN + name + CLOSE, at the same id."""
        spec = json.loads(self.backend.to_str())
        names = {text: f"{OPEN}{text}{CLOSE}" for text in self.control}
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            # Text must not merge into a control token's letters; those merges would have no result any more.
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in names]
        spec["post_processor"] = None
        spec["truncation"] = spec["padding"] = None
        shadow = Tokenizer.from_str(json.dumps(spec))
        moved = [text for text, name in names.items() if shadow.token_to_id(name) != self.ids[text]]
        if moved:
            raise TemplateError(f"cannot encode text that looks like {moved[0]!r}: this tokenizer's ids have gaps")
        return shadow


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def find(ids: np.ndarray, token: int, count: int) -> int:
    """Index of the count-th (from 1) occurrence of a token, or -1."""
    places = np.flatnonzero(ids == token)
    return int(places[count - 1]) if 0 < count <= len(places) else -1
