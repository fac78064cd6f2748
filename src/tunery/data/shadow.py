"""A tokenizer's shadow: the same tokenizer with its control tokens under other names.

Text in which the template's control tokens have been renamed (OPEN + name + CLOSE) is encoded with the tokens they
stand for, while the plain names in it are text like any other, with the merges and prefix spaces that text has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from tunery.errors import TemplateError

# Two noncharacters: Unicode sets them aside for a program's own use, so they are in no text meant for interchange.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def renamed(control: str) -> str:
    return f"{OPEN}{control}{CLOSE}"


class Shadow:
    """The shadow of `backend`. `ids`: its control tokens, and the id of each."""

    def __init__(self, backend: Tokenizer, ids: dict[str, int]):
        self.backend = backend
        self.ids = ids
        unknown = getattr(backend.model, "unk_token", None)
        # Text can only become a control token where the model itself has a piece of that name.
        self.pieces = frozenset(
            i for text, i in ids.items() if text != unknown and backend.model.token_to_id(text) is not None
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts with renamed control tokens."""
        quick, original = self._quick
        encodings = quick.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            [original.get(i, i) for i in encoding.ids] if self._innocent(encoding) else self._exact_ids(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The (start, end) characters of each token of a text with renamed control tokens."""
        encoding = self._quick[0].encode(text, add_special_tokens=False)
        return (encoding if self._innocent(encoding) else self._exact.encode(text, add_special_tokens=False)).offsets

    def _innocent(self, encoding: Encoding) -> bool:
        """Whether no text has become a control token: those the template wrote have other ids in the quick shadow."""
        return not self.pieces or self.pieces.isdisjoint(encoding.ids)

    def _exact_ids(self, text: str) -> list[int]:
        return self._exact.encode(text, add_special_tokens=False).ids

    @cached_property
    def _quick(self) -> tuple[Tokenizer, dict[int, int]]:
        """The backend's own model with other added tokens, and their ids here -> in the backend."""
        quick = Tokenizer(self.backend.model)
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(self.backend, part) is not None:
                setattr(quick, part, getattr(self.backend, part))
        original = {}
        for i, token in sorted(self.backend.get_added_tokens_decoder().items()):
            name = renamed(token.content) if token.content in self.ids else token.content
            added = AddedToken(
                name,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (quick.add_special_tokens if token.special else quick.add_tokens)([added])
            here = quick.token_to_id(name)
            if here != i and (here is None or self.backend.model.id_to_token(here) is not None):
                self.pieces = frozenset()
                return self._exact, {}
            original[here] = i
        return quick, original

    @cached_property
    def _exact(self) -> Tokenizer:
        """The backend with its control tokens renamed in its vocabulary too, and without the merges that make them."""
        spec = json.loads(self.backend.to_str())
        names = {text: renamed(text) for text in self.ids}
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
            model["merges"] = [pair for pair in map(_pair, model["merges"]) if "".join(pair) not in names]
        spec["post_processor"] = None
        shadow = Tokenizer.from_str(json.dumps(spec))
        moved = [text for text, name in names.items() if shadow.token_to_id(name) != self.ids[text]]
        if moved:
            raise TemplateError(f"cannot encode text that looks like {moved[0]!r}: this tokenizer's ids have gaps")
        return shadow


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)
