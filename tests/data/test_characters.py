"""What tokenizers cannot write. Oracle: tokenizers built here, whose alphabets are known."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from assets_path import assets
from tunery.data.characters import Writer, check_vocabulary
from tunery.data.report import DataReport, Noted, SourceReport
from tunery.data.template import load_template
from tunery.data.tokenise import encode_examples
from tunery.errors import TemplateError
from tunery.objectives import pretrain, sft
from tunery.types import Example, Message, Refused

SFT = sft.Objective(sft.Config())
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!:\n"
ANSWERS = "rows whose answers are trained without characters that the tokenizer lacks"
PROMPTS = "rows whose prompts lose characters that the tokenizer lacks"
TEXT = "rows whose text is trained without characters that the tokenizer lacks"


def letters(unknown: str | None) -> PreTrainedTokenizerFast:
    """One token a letter of ALPHABET; any other character is `unknown`, or nothing at all."""
    vocab = {name: i for i, name in enumerate(["<unk>", "</s>", *ALPHABET])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    vocab = {name: i for i, name in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def chat(question: str, answer: str, **more) -> Example:
    return Example([Message("user", question), Message("assistant", answer)], **more)


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_rows_that_lose_characters_are_counted_and_most_of_an_answer_refuses_the_row(unknown):
    template = load_template("plain", letters(unknown))
    examples = [
        chat("Name a fruit.", "A pear."),
        chat("Name (a) fruit.", "A pear."),
        chat("Name a fruit.", "A pear (green)."),
        chat("Name a fruit.", "你好，我是。"),
    ]
    kept, marks = encode_examples(examples, SFT, template)
    assert [number for number, _ in kept] == [0, 1, 2]
    assert marks.refused == [(3, Refused("characters the tokenizer lacks", "你 好 ， 我 是 。"))]
    assert marks.noted == [(1, Noted(PROMPTS, "( )")), (2, Noted(ANSWERS, "( )"))]
    kept, marks = encode_examples([Example(text="a (b)")], pretrain.Objective(pretrain.Config()), template)
    assert len(kept) == 1 and marks.noted == [(0, Noted(TEXT, "( )"))]


def test_only_what_is_trained_can_refuse_a_row():
    template = load_template("plain", letters("<unk>"))
    shown = [
        Message("user", "a"),
        Message("assistant", "你好", weight=0),
        Message("user", "b"),
        Message("assistant", "c"),
    ]
    _, marks = encode_examples([Example(shown)], SFT, template)
    assert marks.noted == [(0, Noted(PROMPTS, "你 好"))] and not marks.refused


def test_a_system_message_from_the_configuration_counts():
    template = load_template("chatml", letters("<unk>"), system="(x)")
    assert template.unwritable([chat("a", "b")]) == [[Noted(PROMPTS, "( )")]]


def test_tokenizers_with_bytes_write_everything():
    assert Writer(byte_level()).complete
    assert not Writer(letters("<unk>")).complete and not Writer(letters(None)).complete
    template = load_template("plain", byte_level())
    assert template.unwritable([chat("你", "好 🙂 \ue000")]) == [[]]


def test_words_and_normal_forms():
    """Whole words are no characters, and another normal form of a character is the same character."""
    vocab = {"<unk>": 0, "pear": 1, "green": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = Writer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [sorted(lost) for lost in words.lost(["green pear", "green fig"])] == [[], ["f", "g", "i"]]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate([*ALPHABET, "é"])}, []))
    backend.normalizer = normalizers.NFKC()
    backend.decoder = decoders.Fuse()
    folded = Writer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [sorted(lost) for lost in folded.lost(["cafe\u0301，", "ü"])] == [[], ["ü"]]


def test_the_report_says_how_many_rows_and_where():
    report = DataReport([SourceReport("data.train[0]", "x.jsonl"), SourceReport("data.train[1]", "y.jsonl")])
    for source, row in ((0, 3), (0, 7), (1, 2), (1, 4)):
        report.note(source, f"{'xy'[source]}.jsonl", row, Noted(ANSWERS, "( )"))
    (line,) = [line for line in report.lines() if line.startswith("warning")]
    assert line == f"warning: {ANSWERS}: 4 (first: x.jsonl:3 ( ), x.jsonl:7 ( ), y.jsonl:2 ( ))"
    assert report.to_dict()["warnings"] == [line.removeprefix("warning: ")]


def test_a_tokenizer_without_a_vocabulary_is_named():
    backend = Tokenizer(models.BPE({"<unk>": 0, "</s>": 1}, [], unk_token="<unk>"))
    empty = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    empty.name_or_path = "some/folder"
    with pytest.raises(TemplateError, match=r"some/folder: the tokenizer has no vocabulary \(2 tokens"):
        load_template("plain", empty)
    with pytest.raises(TemplateError, match="has no vocabulary"):
        check_vocabulary(AutoTokenizer.from_pretrained(assets() / "tokenizers" / "gemma"))
    check_vocabulary(letters(None))


def test_a_real_vocabulary_without_bytes_loses_few_english_answers():
    """Oracle: the vocabulary file, read by eye: it has letters, digits and common punctuation, no brackets."""
    tokenizer = AutoTokenizer.from_pretrained(assets() / "models" / "TinyStories-656K")
    template = load_template("plain", tokenizer)
    judged = template.unwritable([chat("Hi!", "A cat.\nIt's here?"), chat("Hi (you)!", "A cat."), chat("Hi", "你好")])
    assert judged == [[], [Noted(PROMPTS, "( )")], Refused("characters the tokenizer lacks", "你 好")]
