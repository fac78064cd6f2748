"""A template without a tokenizer, for tests of what surrounds templates: one token per character."""

from __future__ import annotations

import numpy as np

from tunery.types import Example, Refused, Tokens

END = 0


class ToyTemplate:
    """Ids are code points; each message ends with END; answers and their END are trained. Longer rows are refused."""

    def __init__(self, max_length: int = 1_000_000):
        self.max_length = max_length
        self.fingerprint = f"toy {max_length}"
        self.rows_encoded = 0

    def encode_many(self, examples: list[Example], train: str = "answers") -> list[list[Tokens] | Refused]:
        self.rows_encoded += len(examples)
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> list[Tokens] | Refused:
        ids: list[int] = []
        weights: list[float] = []
        for message in example.messages:
            text = [ord(letter) for letter in message.content] + [END]
            weight = (1.0 if message.weight is None else message.weight) if message.role == "assistant" else 0.0
            ids += text
            weights += [weight] * len(text)
        if not any(message.role == "assistant" for message in example.messages):
            return Refused("no assistant turn")
        if len(ids) > self.max_length:
            return Refused("too long", f"{len(ids)} tokens > {self.max_length}")
        return [Tokens(np.array(ids, np.int32), np.array(weights, np.float32))]

    def unwritable(self, examples: list[Example]) -> list[list]:
        return [[] for _ in examples]

    def encode_texts(self, examples: list[Example], append_eos: bool = True) -> list[list[Tokens] | Refused]:
        self.rows_encoded += len(examples)
        result: list[list[Tokens] | Refused] = []
        for example in examples:
            ids = np.array([ord(letter) for letter in example.text or ""] + [END], np.int32)
            pieces = [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)]
            result.append([Tokens(piece, np.ones(len(piece), np.float32)) for piece in pieces])
        return result


class ToyObjective:
    """What sft does with rows, without importing torch."""

    def rows(self, examples: list[Example], template: ToyTemplate) -> list[list[Tokens] | Refused]:
        return template.encode_many(examples)


def text_of(tokens: Tokens) -> str:
    """The inverse of the ids, with | for END."""
    return "".join("|" if i == END else chr(i) for i in tokens.ids.tolist())
