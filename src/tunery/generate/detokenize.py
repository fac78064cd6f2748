"""Tokens to text, piece by piece, while they are being generated."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, without special tokens and exactly as generated (no tidying of spaces)."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


class TextStream:
    """Text of a growing list of tokens, in pieces that never split a character.

    A Chinese character or an emoji may take several tokens; until the last of them is here, decoding ends in U+FFFD
    and the piece is held back. Decoding starts a few tokens back, so that a tokenizer which drops the space at the
    start of a text (SentencePiece) does so for both sides of the comparison. The pieces joined are `decode`
    of all, but for bytes that are no UTF-8: a SentencePiece decoder then breaks their whole run, with what was valid
    and has been given out already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._start = 0  # decoding starts here,
        self._shown = 0  # and the text of ids[_start:_shown] has been given out

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self.ids.append(token)
        old, new = self._texts()
        if new.endswith(BROKEN) or len(new) <= len(old):
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return new[len(old) :]

    def flush(self) -> str:
        """What was held back: the beginning of a character that never came is U+FFFD."""
        old, new = self._texts()
        self._start = self._shown = len(self.ids)
        return new[len(old) :]

    def _texts(self) -> tuple[str, str]:
        return (
            decode(self.tokenizer, self.ids[self._start : self._shown]),
            decode(self.tokenizer, self.ids[self._start :]),
        )
