"""A short cut for byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, ...): the tokens of each different word, remembered.

Such a tokenizer cuts text into words by a regular expression and encodes every word by itself, so the tokens of a word
never depend on its neighbours. Natural text repeats its words: after the first few thousand, encoding is a dictionary
look-up per word, several times faster than running the whole tokenizer. Only texts of ASCII, Latin-1 letters and common
punctuation take the short cut: there the character classes of two regular expression engines cannot differ, and
Unicode normalisation (NFC) changes nothing. All others go to the tokenizer itself."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models

# The pattern that ByteLevel(use_regex=True) stands for (GPT-2's).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Unicode's classes among the letters of PLAIN.
_CLASSES = {
    "L": "a-zA-ZÀ-ÖØ-öø-ÿ",
    "Lu": "A-ZÀ-ÖØ-Þ",
    "Ll": "a-zß-öø-ÿ",
    "N": "0-9",
    "Nd": "0-9",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M"), ""),
}
PLAIN = re.compile("[\\0-\\x7fÀ-ÖØ-öø-ÿ×÷£¥°±·–—‘’“”…•€→]*")
_LONGEST_WORD = 64  # characters; longer ones hardly come twice
_MOST_WORDS = 300_000  # some 60 MB
# Compared with the tokenizer itself before the short cut is trusted.
_PROBES = (
    "Hello, world! It's 12345 o'clock;  we'LL   see.\n\n\tif (x_1 != 0x1F) { return \"a-b\"; }  \r\n  \n end ",
    " leading and trailing   ",
    "\n\n\n",
    "a\tb\x0bc\x0cd\x00e\x1cf\x7fg",
    "$3.50/kg (75%) user@example.com #tag ~^`|<>[]",
    "“Déjà vu” – it’s 20°C… CAFÉ ÀÉÎõü×÷ß £5 • naïve—Ñandú",
)  # fmt: skip


class Words(dict[str, list[int]]):
    """Word -> token ids, filled as words come."""

    def __init__(self, model: models.Model):
        super().__init__()
        self.model = model

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self.model.tokenize(word.encode().decode("latin-1").translate(_BYTES))]
        if len(word) <= _LONGEST_WORD and len(self) < _MOST_WORDS:
            self[word] = ids
        return ids


class WordEncoder:
    """Encodes texts of PLAIN letters as `backend.encode(text, add_special_tokens=False)` does. Made by
    `word_encoder`."""

    def __init__(self, backend: Tokenizer, pattern: str):
        added = backend.get_added_tokens_decoder()
        self.added = {token.content: [i] for i, token in added.items()}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.parts = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.words = re.compile(pattern, re.ASCII)
        self.known = Words(backend.model)
        self.sections: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int] | None:
        """Token ids, or None for a text that this cannot encode."""
        if not (text.isascii() or PLAIN.fullmatch(text)):
            return None
        ids: list[int] = []
        for i, part in enumerate(self.parts.split(text)):
            if i % 2:
                ids += self.added[part]
            elif part:
                section = self.sections.get(part)
                if section is None:
                    found = self.words.findall(part)
                    if len("".join(found)) != len(part):
                        return None
                    section = list(chain.from_iterable(map(self.known.__getitem__, found)))
                    if len(part) <= 4 * _LONGEST_WORD and len(self.sections) < 10_000:
                        self.sections[part] = section
                ids += section
        return ids


def word_encoder(backend: Tokenizer) -> WordEncoder | None:
    """The short cut for this tokenizer, or None where it has other parts than the short cut knows."""
    pattern = _pattern(backend)
    tokens = backend.get_added_tokens_decoder().values()
    if pattern is None or any(t.lstrip or t.rstrip or t.single_word for t in tokens):
        return None
    encoder = WordEncoder(backend, pattern)
    for text in _PROBES:
        if encoder.encode(text) != backend.encode(text, add_special_tokens=False).ids:
            return None
    return encoder


def _pattern(backend: Tokenizer) -> str | None:
    """The regular expression that cuts PLAIN text into words, where the tokenizer is byte-level BPE."""
    if not isinstance(backend.model, models.BPE) or backend.model.dropout:
        return None
    if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
        return None
    state = _state(backend.pre_tokenizer) if backend.pre_tokenizer is not None else {}
    steps = state.get("pretokenizers", [state])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex"):
        return _written_out(_GPT2)
    if len(steps) != 2 or last.get("use_regex") or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split.get("behavior") != "Isolated" or split.get("invert") or "Regex" not in split.get("pattern", {}):
        return None
    return _written_out(split["pattern"]["Regex"])


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())


def _written_out(pattern: str) -> str | None:
    r"""The pattern with \p{...} classes written out for PLAIN text; None where one is unknown or left empty."""
    out = []
    inside = False
    for piece in re.findall(r"\\p\{\w+\}|\\.|.", pattern, flags=re.DOTALL):
        if piece.startswith("\\p"):
            letters = _CLASSES.get(piece[3:-1])
            if letters is None or not (letters or inside):
                return None
            out.append(letters if inside else f"[{letters}]")
            continue
        inside = (inside or piece == "[") and piece != "]"
        out.append(piece)
    try:
        re.compile("".join(out), re.ASCII)
    except re.error:
        return None
    return "".join(out)


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where that is printable."""
    hidden = [b for b in range(256) if not (33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255)]
    return {b: chr(256 + n) for n, b in enumerate(hidden)}


_BYTES = _byte_letters()
