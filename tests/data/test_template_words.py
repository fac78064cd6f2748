"""The word cache. Oracle: the tokenizer itself, token for token."""

from __future__ import annotations

import json
import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_cases import TEXTS, small_tokenizer, tokenizer
from tokenizers import Tokenizer

from tunery.data.words import _CLASSES, PLAIN, WordEncoder, word_encoder

ASCII = [chr(i) for i in range(128)]
LATIN = [*ASCII, *"ÀÉÎÖØÞßàéîöøþÿ×÷£¥°±·–—‘’“”…•€→" * 3]
TRICKY = " \n\t\r'sSlLdDrRvVeEmM9.a_</|>"


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "gpt2"])
def test_equals_the_tokenizer(name):
    backend = tokenizer(name).backend_tokenizer
    encoder = word_encoder(backend)
    assert encoder is not None
    rng = random.Random(0)
    texts = [
        "".join(rng.choices(letters, k=rng.randint(0, 50))) for letters in (ASCII, TRICKY, LATIN) for _ in range(1200)
    ]
    texts += [text for text in TEXTS if PLAIN.fullmatch(text)]
    texts += [f"<|im_start|>user\n{a}<|im_end|>{b}" for a, b in zip(texts[::9], texts[::7], strict=False)]
    expected = backend.encode_batch_fast(texts, add_special_tokens=False)
    assert [encoder.encode(text) for text in texts] == [encoding.ids for encoding in expected]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(LATIN), max_size=80))
def test_equals_a_small_tokenizer_on_any_plain_text(text):
    backend = small_tokenizer(("<a>", "<a>b")).backend_tokenizer
    encoder = word_encoder(backend)
    assert encoder is not None
    for shown in (text, f"<a>{text}<a>b"):
        assert encoder.encode(shown) == backend.encode(shown, add_special_tokens=False).ids


def test_a_pattern_that_leaves_letters_out():
    spec = json.loads(small_tokenizer().backend_tokenizer.to_str())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r" ?\p{L}+|\s+"}
    backend = Tokenizer.from_str(json.dumps(spec))
    assert word_encoder(backend) is None  # the probes have digits, which no word holds
    encoder = WordEncoder(backend, " ?[a-zA-Z]+|[ ]+")
    assert encoder.encode("one two") == backend.encode("one two").ids
    assert encoder.encode("one 2") is None


def test_the_classes_are_unicode_s():
    # Oracle: Python's Unicode database. No letter of PLAIN may be of a class that is not written out, or change in NFC.
    plain = [chr(i) for i in range(0x3000) if PLAIN.fullmatch(chr(i))]
    assert len(plain) > 200
    for letter in plain:
        kind = unicodedata.category(letter)
        assert (kind in ("Lu", "Ll")) == bool(re.fullmatch(f"[{_CLASSES['L']}]", letter))
        assert (kind == "Lu") == bool(re.fullmatch(f"[{_CLASSES['Lu']}]", letter))
        assert kind[0] != "M"
        assert (kind[0] == "N") == (letter in "0123456789")
        assert letter.isascii() or not letter.isspace()
        assert unicodedata.is_normalized("NFC", letter)
        assert unicodedata.combining(letter) == 0
    assert not PLAIN.fullmatch("e\u0301")
    assert not PLAIN.fullmatch("中")


@pytest.mark.parametrize("name", ["phi-3-mini", "stories260K", "llama2"])
def test_other_kinds_of_tokenizer_take_no_short_cut(name):
    assert word_encoder(tokenizer(name).backend_tokenizer) is None
