"""Drafts to sequences with a loss weight per token.

The rule: what is trained is exactly what the model would have to produce. An answer's tokens begin where the prompt
that inference would send ends - the prompt's tokens are a prefix of the sequence - and end with its end-of-turn token.
Turns for which that holds in the whole conversation share one sequence; a turn for which it does not (the template
rewrites history, or the answer's first letters merge with the prompt's last ones) becomes a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunery.data.codec import Codec
from tunery.data.drafts import Draft, Turn
from tunery.data.render import RowRefused
from tunery.data.spans import factors
from tunery.types import Tokens

LONGEST_HEADER = 200  # characters; longer text after a prompt's last control token is not worth remembering


class Encoder:
    """Drafts to Tokens. `ends`: ids of the tokens that end an assistant's turn in this template."""

    def __init__(self, codec: Codec, ends: Sequence[int]):
        self.codec = codec
        self.ends = frozenset(ends)
        self._headers: dict[str, tuple[str, int, list[int]]] = {}

    def encode(self, drafts: Sequence[Draft]) -> list[list[Tokens] | RowRefused]:
        """The sequences of each draft, in one call of the tokenizer for all."""
        ids_of = self.codec.encode_mixed([(draft.text, draft.shadow) for draft in drafts])
        return [self._finish(draft, ids) for draft, ids in zip(drafts, ids_of, strict=True)]

    def _finish(self, draft: Draft, ids: list[int]) -> list[Tokens] | RowRefused:
        weights = np.full(len(ids), draft.base, dtype=np.float32)
        sequences = []
        shared = False
        try:
            for turn in draft.turns:
                start = self._boundary(ids, turn.prompt, draft.shadow)
                if start >= 0:
                    self._weigh(ids, weights, start, turn, draft.shadow)
                    shared = True
                elif draft.base and turn.index == draft.count - 1:
                    return [self._own(turn, draft)]
                elif not draft.base:
                    sequences.append(self._own(turn, draft))
        except RowRefused as refused:
            return refused
        if shared or draft.base:
            sequences.append(Tokens(np.array(ids, dtype=np.int32), weights))
        return sequences

    def _boundary(self, ids: list[int], prompt: str, shadow: bool) -> int:
        """Number of tokens in the prompt, or -1 when its tokens are not a prefix of `ids`.

        Control tokens cut a text into parts that are tokenised on their own. So the prompt's tokens are those of `ids`
        up to its last control token, and then those of the few letters after it, which are tokenised once for all."""
        known = next((value for header, value in self._headers.items() if prompt.endswith(header)), None)
        if known is None:
            place = self.codec.last_control(prompt, shadow)
            if place is None:
                (tail,) = self.codec.encode([prompt], shadow)
                return len(tail) if ids[: len(tail)] == tail else -1
            header = prompt[place.start() :]
            control_id, *tail = self.codec.encode([header], shadow)[0]
            known = place.group(), control_id, tail
            if len(header) <= LONGEST_HEADER:
                self._headers[header] = known
        control, control_id, tail = known
        after = 0
        for _ in range(prompt.count(control)):
            after = _index(ids, control_id, after) + 1
            if not after:
                return -1
        end = after + len(tail)
        return end if ids[after:end] == tail else -1

    def _weigh(self, ids: list[int], weights: np.ndarray, start: int, turn: Turn, shadow: bool) -> None:
        """Set the weights of one answer, whose first token is at `start`."""
        end = min((place for token in self.ends if (place := _index(ids, token, start)) >= 0), default=-1)
        if end < 0:
            detail = f"the template ends message {turn.index + 1} with no token to stop at"
            raise RowRefused("no end-of-turn token", detail)
        weights[start : end + 1] = turn.weight
        if not (turn.spans or turn.untrained):
            return  # places of tokens are not needed
        offsets = self.codec.offsets(turn.upto, shadow)[: end + 1]
        if turn.spans:
            weights[start : end + 1] *= factors(turn.upto, offsets, turn.spans)[start:]
        for i, (a, b) in enumerate(offsets if turn.untrained else ()):
            if a < b and any(first < b and a < last for first, last in turn.untrained):
                weights[i] = 0.0

    def _own(self, turn: Turn, draft: Draft) -> Tokens:
        """The sequence of one answer as inference makes it: the prompt's tokens, then the rest tokenised after them."""
        whole, prompt = self.codec.encode([turn.upto, turn.prompt], draft.shadow)
        if whole[: len(prompt)] != prompt:
            if turn.untrained or turn.spans:
                raise RowRefused("prompt and answer share a token", f"message {turn.index + 1}")
            whole = prompt + self._continuation(turn, whole, prompt, draft.shadow)
        weights = np.full(len(whole), draft.base, dtype=np.float32)
        self._weigh(whole, weights, len(prompt), turn, draft.shadow)
        return Tokens(np.array(whole, dtype=np.int32), weights)

    def _continuation(self, turn: Turn, whole: list[int], prompt: list[int], shadow: bool) -> list[int]:
        """Tokens of the text after the prompt. A tokenizer may put a space before text that stands alone, so it is
        tried after a control token, alone, and after letters it may not merge with; the first that leaves those alone
        and decodes to the same text is right."""
        rest = turn.upto[len(turn.prompt) :]
        place = self.codec.last_control(turn.prompt, shadow)
        anchors = ([place.group()] if place else []) + ["", "\n", "a", "1"]
        text = self.codec.decode(whole)
        for anchor in anchors:
            head, both = self.codec.encode([anchor, anchor + rest], shadow)
            if both[: len(head)] == head and self.codec.decode(prompt + both[len(head) :]) == text:
                return both[len(head) :]
        raise RowRefused("prompt and answer share a token", f"message {turn.index + 1} begins with {rest[:20]!r}")


def _index(ids: list[int], token: int, start: int) -> int:
    """Place of the first such token from `start` on, or -1."""
    try:
        return ids.index(token, start)
    except ValueError:
        return -1
