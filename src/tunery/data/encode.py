"""Rendered conversations to sequences with a loss weight per token.

The rule: what is trained is exactly what the model would have to produce. An answer's tokens begin where the prompt
that inference would send ends - the prompt's tokens are a prefix of the sequence - and end with its end-of-turn token.
Turns for which that holds in the whole conversation share one sequence; a turn for which it does not (the template
rewrites history, or the answer's first letters merge with the prompt's last ones) becomes a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tunery.data.codec import Codec, find
from tunery.data.render import RowRefused
from tunery.types import Tokens

LONGEST_HEADER = 200  # characters; longer text after a prompt's last control token is not worth remembering


@dataclass(slots=True)
class Turn:
    """One trained answer: the text of its prompt, of the conversation up to and with it, and its loss weight."""

    prompt: str
    upto: str
    weight: float
    last: bool


@dataclass(slots=True)
class Draft:
    """One rendered text to be one sequence. `shadow`: it holds renamed control tokens; `base`: weight of the rest."""

    text: str
    shadow: bool
    turns: list[Turn] = field(default_factory=list)
    base: float = 0.0


class Encoder:
    """Drafts to Tokens. `ends`: ids of the tokens that end an assistant's turn in this template."""

    def __init__(self, codec: Codec, ends: Sequence[int]):
        self.codec = codec
        self.ends = frozenset(ends)
        self._headers: dict[str, tuple[str, int, list[int]]] = {}

    def encode(self, drafts: Sequence[Draft]) -> list[list[Tokens] | RowRefused]:
        """The sequences of each draft, in one call of the tokenizer for all."""
        ids_of: list[list[int]] = [[]] * len(drafts)
        for shadow in (False, True):
            places = [i for i, draft in enumerate(drafts) if draft.shadow is shadow]
            if places:
                for i, ids in zip(places, self.ids([drafts[i].text for i in places], shadow), strict=True):
                    ids_of[i] = ids
        return [self._finish(draft, ids) for draft, ids in zip(drafts, ids_of, strict=True)]

    def ids(self, texts: Sequence[str], shadow: bool) -> list[list[int]]:
        return self.codec.encode_shadow(texts) if shadow else self.codec.encode(texts)

    def _finish(self, draft: Draft, ids_list: list[int]) -> list[Tokens] | RowRefused:
        ids = np.array(ids_list, dtype=np.int32)
        weights = np.full(len(ids), draft.base, dtype=np.float32)
        sequences = []
        shared = False
        try:
            for turn in draft.turns:
                start = self._boundary(ids, turn.prompt, draft.shadow)
                if start < 0:
                    own = self._own(turn, draft)
                    if turn.last and draft.base:
                        return [own]
                    sequences.append(own)
                else:
                    weights[start : self._end(ids, start) + 1] = turn.weight
                    shared = True
        except RowRefused as refused:
            return refused
        if shared or draft.base:
            sequences.append(Tokens(ids, weights))
        return sequences

    def _boundary(self, ids: np.ndarray, prompt: str, shadow: bool) -> int:
        """Number of tokens in the prompt, or -1 when its tokens are not a prefix of `ids`.

        Control tokens cut a text into parts that are tokenised on their own. So the prompt's tokens are those of `ids`
        up to its last control token, and then those of the few letters after it, which are tokenised once for all."""
        for header, (control, control_id, tail) in self._headers.items():
            if prompt.endswith(header):
                break
        else:
            place = self.codec.last_control(prompt, shadow)
            if place is None:
                (tail,) = self.ids([prompt], shadow)
                return len(tail) if ids[: len(tail)].tolist() == tail else -1
            control = place.group()
            header = prompt[place.start() :]
            control_id, *tail = self.ids([header], shadow)[0]
            if len(header) <= LONGEST_HEADER:
                self._headers[header] = control, control_id, tail
        after = find(ids, control_id, prompt.count(control)) + 1
        end = after + len(tail)
        return end if after and ids[after:end].tolist() == tail else -1

    def _end(self, ids: np.ndarray, start: int) -> int:
        """Index of the end-of-turn token of the answer that begins at `start`."""
        for i, token in enumerate(ids[start:].tolist(), start):
            if token in self.ends:
                return i
        raise RowRefused("no end-of-turn token", "the template ends this turn with no token that generation stops at")

    def _own(self, turn: Turn, draft: Draft) -> Tokens:
        """The sequence of one answer as inference makes it: the prompt's tokens, then the rest tokenised after them."""
        shadow = draft.shadow
        whole, prompt = self.ids([turn.upto, turn.prompt], shadow)
        if whole[: len(prompt)] != prompt:
            whole = prompt + self._continuation(turn, whole, prompt, shadow)
        ids = np.array(whole, dtype=np.int32)
        weights = np.full(len(ids), draft.base, dtype=np.float32)
        weights[len(prompt) : self._end(ids, len(prompt)) + 1] = turn.weight
        return Tokens(ids, weights)

    def _continuation(self, turn: Turn, whole: list[int], prompt: list[int], shadow: bool) -> list[int]:
        """Tokens of the text after the prompt. A tokenizer may put a space before text that stands alone, so it is
        tried after a control token, alone, and after a line break; the one that decodes to the same text is right."""
        rest = turn.upto[len(turn.prompt) :]
        place = self.codec.last_control(turn.prompt, shadow)
        anchors = ([place.group()] if place else []) + ["", "\n"]
        text = self.codec.decode(whole)
        for anchor in anchors:
            head, both = self.ids([anchor, anchor + rest], shadow)
            if both[: len(head)] == head and self.codec.decode(prompt + both[len(head) :]) == text:
                return both[len(head) :]
        raise RowRefused("prompt and answer share a token", f"the answer begins with {rest[:20]!r}")
