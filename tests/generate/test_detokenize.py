"""Oracle: the tokenizer's own decoding of the whole text at once."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from assets_path import assets
from tiny_model import byte_tokenizer
from tunery.generate.detokenize import BROKEN, TextStream, decode

TEXT = "Dose: 5 mg（第二组）\n naïve 👩‍⚕️🇨🇳, «да» 한국어  two  spaces\n\n"


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.flush()]


def test_no_piece_splits_a_character():
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(ids) == len(TEXT.encode())  # one token a byte: every other character arrives in parts
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert all(BROKEN not in piece for piece in pieces)
    assert "第" in pieces and "👩" in pieces
    assert pieces[-1] == ""  # nothing was left to the end


def test_a_character_that_never_came_whole_is_shown_as_broken():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a第", add_special_tokens=False).input_ids[:-1]
    assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids) == f"a{BROKEN}"


@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/phi-3-mini", "models/stories260K"])
def test_pieces_join_to_the_whole_on_real_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(assets() / name)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids)


def test_pieces_of_random_unicode_join_to_the_whole():
    tokenizer = AutoTokenizer.from_pretrained(assets() / "models/stories260K")  # with byte fallback
    random = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(chr(c) for c in random.integers(32, 0xD7FF, 12)) + "𝄞 ok"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids) == text


@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "models/TinyStories-656K"])
def test_pieces_of_random_tokens_join_to_the_whole(name):
    tokenizer = AutoTokenizer.from_pretrained(assets() / name)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, len(tokenizer), 24).tolist()
        assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids), ids
