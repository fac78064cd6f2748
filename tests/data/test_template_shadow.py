"""Text that looks like control tokens. Oracle: the same tokenizer built without those tokens, where there is one."""

from __future__ import annotations

import json

import pytest
from template_cases import small_tokenizer, tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tunery.data.shadow import Shadow, renamed
from tunery.data.template import load_template
from tunery.types import Message

TEXTS = ["<|im_end|>", "say </s> and <|im_end|>, 你好</s>", "a<|im_start|><|im_start|>b", "no look-alike"]


def _spec():
    return json.loads(small_tokenizer().backend_tokenizer.to_str())


def _with_merges_to_end_of_sequence():
    """A byte-level tokenizer whose own merges make </s> out of its letters, as some converted vocabularies do."""
    spec = _spec()
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]  # no words: merges go across punctuation
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = [["<", "/"], ["s", ">"], ["</", "s>"], *spec["model"]["merges"]]
    for piece in ("</", "s>", "</s>"):
        vocab.setdefault(piece, len(vocab))
    spec["added_tokens"][0].update(content="</s>", id=vocab["</s>"])
    return Tokenizer.from_str(json.dumps(spec))


def test_renamed_tokens_are_tokens_and_plain_names_are_text():
    tok = small_tokenizer(("<|im_start|>", "<|im_end|>"))
    backend = tok.backend_tokenizer
    ids = {name: tok.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "</s>")}
    shadow = Shadow(backend, ids)
    spec = _spec()
    spec["added_tokens"] = []
    bare = Tokenizer.from_str(json.dumps(spec))  # oracle: it has no such tokens at all
    for text, got in zip(TEXTS, shadow.encode(TEXTS), strict=True):
        assert got == bare.encode(text).ids
    both = "x" + renamed("<|im_end|>") + "<|im_end|>"
    assert shadow.encode([both]) == [[*bare.encode("x").ids, ids["<|im_end|>"], *bare.encode("<|im_end|>").ids]]
    assert [both[a:b] for a, b in shadow.offsets(both)][:2] == ["x", renamed("<|im_end|>")]


def test_letters_that_would_merge_into_a_control_token():
    backend = _with_merges_to_end_of_sequence()
    eos = backend.token_to_id("</s>")
    assert backend.encode("a</s>b", add_special_tokens=False).ids.count(eos) == 1
    shadow = Shadow(backend, {"</s>": eos})
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = []
    assert eos in Tokenizer.from_str(json.dumps(spec)).encode("a</s>b").ids  # so it is not enough to drop the token
    for text in ("a</s>b", "</s>", "你</s>好"):
        plain, marked = shadow.encode([text, text + renamed("</s>")])
        assert eos not in plain
        assert backend.decode(plain) == text
        assert marked == [*plain, eos]
    assert "".join("a</s>b"[a:b] for a, b in shadow.offsets("a</s>b")) == "a</s>b"


def test_a_chat_with_such_a_tokenizer():
    made = PreTrainedTokenizerFast(tokenizer_object=_with_merges_to_end_of_sequence(), eos_token="</s>")
    template = load_template("zephyr", made)
    messages = [Message("user", "Why </s>?"), Message("assistant", "So </s>.")]
    (tokens,) = template.encode(messages)
    assert tokens.ids.tolist().count(made.eos_token_id) == 2
    assert made.decode(tokens.ids) == "<|user|>\nWhy </s>?</s>\n<|assistant|>\nSo </s>.</s>\n"
    prompt = template.prompt(messages[:1])
    assert tokens.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", ["llama2", "phi-3-mini", "stories260K", "gpt2"])
def test_the_quick_shadow_equals_the_exact_one(name):
    backend = tokenizer(name).backend_tokenizer
    added = backend.get_added_tokens_decoder()
    ids = {token.content: i for i, token in list(added.items())[:40]}
    shadow = Shadow(backend, ids)
    texts = [f"{renamed(control)}Hello 你好 {control}\n\n {renamed(control)}" for control in ids]
    assert shadow.encode(texts) == [shadow._exact_ids(text) for text in texts]


def test_truncation_and_padding_of_the_tokenizer_file_do_not_apply():
    backend = Tokenizer.from_str(small_tokenizer(("<|im_start|>", "<|im_end|>")).backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    free = load_template("chatml", small_tokenizer(("<|im_start|>", "<|im_end|>")))
    messages = [Message("user", "One two three four five six"), Message("assistant", "Seven")]
    made.backend_tokenizer.enable_truncation(5)
    made.backend_tokenizer.enable_padding(length=50)
    (got,), (expected,) = load_template("chatml", made).encode(messages), free.encode(messages)
    assert got.ids.tolist() == expected.ids.tolist()
    assert made.backend_tokenizer.truncation is not None
