"""What happens to rows that do not fit a template or a length. Oracles: the rule of each case, stated beside it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from template_cases import TOOLS, conversation, small_tokenizer, spans
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunery.data.template import load_template
from tunery.errors import ConfigError, DataError, TemplateError
from tunery.types import Example, Message, Refused, Tokens, ToolCall

CHATML = ("<|im_start|>", "<|im_end|>")
WORDS = "one two three four five six seven eight nine ten eleven twelve"


def _chatml(**options):
    tok = small_tokenizer(CHATML)
    return tok, load_template("chatml", tok, **options)


def _long(n=4):
    messages = [Message("system", "Stay kind.")]
    for i in range(n):
        messages += [Message("user", f"Question {i}: {WORDS}"), Message("assistant", f"Answer {i}. {WORDS}")]
    return messages


# ---------------------------------------------------------------- length


def test_drop_and_error_name_the_length_and_the_row():
    example = Example(messages=_long(), meta={"file": "d.jsonl", "row": 7})
    (refused,) = _chatml(max_length=40)[1].encode_many([example])
    assert isinstance(refused, Refused)
    assert refused.reason == "too long"
    assert refused.detail.endswith("tokens > 40")
    with pytest.raises(DataError, match=r"d\.jsonl, row 7: \d+ tokens > 40\. Raise data\.max_length"):
        _chatml(max_length=40, too_long="error")[1].encode_many([example])
    with pytest.raises(ConfigError, match="drop, truncate, error"):
        _chatml(too_long="cut")


@pytest.mark.parametrize("limit", range(40, 400, 23))
def test_truncation_keeps_system_header_and_end_token(limit):
    tok, made = _chatml(max_length=limit, too_long="truncate")
    whole = _chatml()[1].encode([*_long()[:1], *_long()[-2:]])[0]
    (tokens,) = made.encode(_long())
    text = tok.decode(tokens.ids)
    assert tokens.extra == ({"truncated": True} if limit < 330 else tokens.extra)
    assert len(tokens) <= limit
    assert text.startswith("<|im_start|>system\nStay kind.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n")
    # The last answer always ends with its end token, and as long as a whole round fits it is a whole round.
    last = tok.decode(spans(tokens)[-1])
    assert last.startswith("A" if limit < len(whole) else "Answer 3. one")
    assert last.endswith("<|im_end|>")
    if limit >= len(whole) + 2:
        assert last == f"Answer 3. {WORDS}<|im_end|>"
        assert "Question 3: one" in text
    assert tokens.labelled > 1


def test_truncation_order_is_oldest_rounds_then_question_then_answer():
    tok, whole = _chatml()
    messages = _long(3)
    length = len(whole.encode(messages)[0])
    last_round = len(whole.encode([messages[0], *messages[-2:]])[0])
    for limit, kept in ((length, "012"), (length - 1, "12"), (last_round, "2")):
        (tokens,) = load_template("chatml", tok, max_length=limit, too_long="truncate").encode(messages)
        text = tok.decode(tokens.ids)
        assert "".join(str(i) for i in range(3) if f"Answer {i}." in text) == kept
        assert len(spans(tokens)) == len(kept)
    # One token less than the last round: its question loses its middle, and the answer stays.
    (tokens,) = load_template("chatml", tok, max_length=last_round - 1, too_long="truncate").encode(messages)
    text = tok.decode(tokens.ids)
    assert f"Answer 2. {WORDS}" in text
    assert "Question 2" in text
    assert "twelve<|im_end|>" in text
    assert WORDS + "<|im_end|>\n<|im_start|>assistant" not in text
    # The system message alone is too long: refused, not emptied.
    big = [Message("system", WORDS * 3), *messages[1:]]
    with pytest.raises(TemplateError, match=r"too long: .* what must stay does not fit"):
        load_template("chatml", tok, max_length=40, too_long="truncate").encode(big)


def test_truncation_of_random_conversations_is_never_over_the_limit():
    tok, made = _chatml(max_length=90, too_long="truncate")
    rng = random.Random(5)
    examples = [
        Example(messages=m, tools=t)
        for m, t in (conversation(rng, alike=i % 2 == 0, reasoning=True) for i in range(40))
    ]
    end = tok.convert_tokens_to_ids("<|im_end|>")
    cut = 0
    for sequences in made.encode_many(examples):
        if isinstance(sequences, Refused):
            assert sequences.reason == "too long"
            continue
        for tokens in sequences:
            assert len(tokens) <= 90
            assert all(run[-1] == end for run in spans(tokens))
            assert spans(tokens)
            cut += tokens.extra.get("truncated", False)
    assert cut > 10


# ---------------------------------------------------------------- rows that cannot be used


@pytest.mark.parametrize(
    ("messages", "train", "reason"),
    [
        ([Message("user", "Hi")], "answers", "no assistant turn"),
        ([], "last", "no assistant turn"),
        ([Message("user", "Hi"), Message("assistant", "  \n")], "answers", "empty answer"),
        ([Message("user", "Hi"), Message("assistant", "x", weight=0)], "answers", "nothing to train"),
        ([Message("user", "Hi"), Message("assistant", "a\ufdd0<|im_end|>")], "answers", "reserved characters"),
        ([Message("user", "Hi \ud83d"), Message("assistant", "Hello")], "answers", "broken characters"),
    ],
)
def test_refused(messages, train, reason):
    _, made = _chatml()
    fine = Example(messages=[Message("user", "Hi"), Message("assistant", "Hello")])
    results = made.encode_many([fine, Example(messages=messages), fine], train=train)
    assert isinstance(results[1], Refused)
    assert results[1].reason == reason
    assert isinstance(results[0], list)
    assert isinstance(results[2], list)
    with pytest.raises(TemplateError, match=reason):
        made.encode(messages, train=train)


def test_empty_answers_that_are_not_trained_are_no_reason_to_refuse():
    _, made = _chatml()
    messages = [Message("user", "a"), Message("assistant", ""), Message("user", "b"), Message("assistant", "c")]
    assert len(spans(made.encode(messages, train="last")[0])) == 1
    messages[1] = Message("assistant", "", weight=0)
    assert len(spans(made.encode(messages)[0])) == 1


def test_media_rows_and_unknown_train_are_refused():
    _, made = _chatml()
    messages = [Message("user", "<image>"), Message("assistant", "A cat.")]
    (refused,) = made.encode_many([Example(messages=messages, media=["cat.png"])])
    assert isinstance(refused, Refused)
    assert refused.reason == "media not supported"
    with pytest.raises(ConfigError, match="answers, last, all"):
        made.encode(messages, train="some")


# ---------------------------------------------------------------- templates with ways of their own


def _own(tmp_path, source, special=(), **options):
    path = tmp_path / "own.jinja"
    path.write_text(source, encoding="utf-8")
    tok = small_tokenizer(special, **options)
    return tok, load_template(str(path), tok)


ASK = [Message("user", "Why?"), Message("assistant", "Because."), Message("user", "So?"), Message("assistant", "Yes.")]


def test_generation_markers_limit_what_is_trained(tmp_path):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<A>note: {% generation %}{{ m.content }}{% endgeneration %}</s>"
        "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )
    tok, made = _own(tmp_path, source, ("<A>", "<U>"))
    for messages in (ASK, [Message("user", "<A> is text"), *ASK[1:]]):
        (tokens,) = made.encode(messages)
        assert [tok.decode(run).strip() for run in spans(tokens)] == ["Because.</s>", "Yes.</s>"]
        assert tokens.ids[: len(made.prompt(messages[:1]))].tolist() == made.prompt(messages[:1])


def test_an_answer_without_an_end_token_gets_eos(tmp_path):
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tok, made = _own(tmp_path, source)
    texts = [tok.decode(t.ids) for t in made.encode(ASK)]
    assert texts == [
        "user: Why?\nassistant: Because.\n</s>",
        "user: Why?\nassistant: Because.\nuser: So?\nassistant: Yes.\n</s>",
    ]
    assert [tok.decode(run) for t in made.encode(ASK) for run in spans(t)] == [" Because.\n</s>", " Yes.\n</s>"]
    assert made.end_ids == [tok.eos_token_id]
    assert made.parse(spans(made.encode(ASK)[1])[0]).content == "Yes."
    tok, made = _own(tmp_path, source, eos=None)
    with pytest.raises(TemplateError, match="no eos_token"):
        made.encode(ASK)


def test_a_prompt_that_changes_once_answered_is_trained_as_inference_sends_it(tmp_path):
    # Like Mistral's: the system message stands before the last question, as long as that has no answer.
    source = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}[Q]{% if loop.last and system %}{{ system }}\n{% endif %}{{ m.content }}[/Q]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tok, made = _own(tmp_path, source, ("[Q]", "[/Q]"))
    messages = [Message("system", "Brief."), *ASK]
    assert [tok.decode(t.ids) for t in made.encode(messages)] == [
        "[Q]Brief.\nWhy?[/Q]Because.</s>",
        "[Q]Why?[/Q]Because.</s>[Q]Brief.\nSo?[/Q]Yes.</s>",
    ]
    for tokens, i in zip(made.encode(messages), (2, 4), strict=True):
        prompt = made.prompt(messages[:i])
        assert tokens.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("said", ["Hm.", "Hm. </s>"])
def test_a_prompt_that_opens_the_reasoning(tmp_path, said):
    # Like DeepSeek R1's: the prompt ends with <think>, and a finished turn shows no reasoning.
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>"
        "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A><think>\n{% endif %}"
    )
    tok, made = _own(tmp_path, source, ("<A>", "<U>"))
    messages = [ASK[0], Message("assistant", "Because.", reasoning=said), ASK[2], ASK[3]]
    first, second = made.encode(messages)
    assert tok.decode(first.ids) == f"<U>Why?<A><think>\n{said}\n</think>\n\nBecause.</s>"
    assert tok.decode(second.ids) == "<U>Why?<A>Because.</s><U>So?<A><think>\n\n</think>\n\nYes.</s>"
    assert first.ids.tolist().count(tok.eos_token_id) == 1
    for tokens, i in ((first, 1), (second, 3)):
        prompt = made.prompt(messages[:i])
        assert tokens.ids[: len(prompt)].tolist() == prompt
    got = made.parse(spans(first)[0])
    assert (got.reasoning, got.content) == (said, "Because.")


def test_what_a_template_leaves_out_is_refused(tmp_path):
    source = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ '<A>' if m.role == 'assistant' else '<U>' }}"
        "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )
    _, made = _own(tmp_path, source, ("<A>", "<U>"))
    call = Message("assistant", "", tool_calls=(ToolCall("get_weather", {}),))
    cases = [
        ([Message("system", "Rhyme"), *ASK], None, "template leaves out system messages"),
        ([ASK[0], Message("tool", "Sunny"), ASK[1]], None, "template leaves out tool messages"),
        (ASK, TOOLS, "template has no place for tools"),
        ([ASK[0], call], None, "template has no place for tool calls"),
        ([ASK[0], Message("assistant", "x", reasoning="Thought")], None, "template has no place for reasoning"),
    ]
    for messages, tools, reason in cases:
        (refused,) = made.encode_many([Example(messages=messages, tools=tools)])
        assert isinstance(refused, Refused)
        assert refused.reason == reason


def test_a_template_that_cannot_be_trained_exactly_says_so(tmp_path):
    source = (
        "{% for m in messages %}<U>{{ m.content }}{{ loop.length }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<A>{% endif %}"
    )
    _, made = _own(tmp_path, source, ("<A>", "<U>"))
    with pytest.raises(TemplateError, match="the prompt does not lead to the answer: message 2"):
        made.encode(ASK)
    _, broken = _own(tmp_path, "{% for m in messages %}\n{{ m.content }")
    with pytest.raises(TemplateError, match="not valid Jinja, line 2"):
        broken.encode(ASK)


def test_several_templates_of_one_tokenizer():
    plain = "{% for m in messages %}<U>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<U>{% endif %}\n"
    tools = "  {% for m in messages %}<T>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<T>{% endif %} "
    tok = small_tokenizer(("<U>", "<T>"))
    tok.chat_template = {"default": plain, "tool_use": tools}
    made = load_template("auto", tok)
    assert made.source is not None
    rows = [{"role": "user", "content": "Hi"}]
    for given in (None, TOOLS):
        asked = tok.apply_chat_template(rows, tools=given, add_generation_prompt=True, tokenize=False)
        ours = tok.apply_chat_template(
            rows, tools=given, chat_template=made.source, add_generation_prompt=True, tokenize=False
        )
        assert ours == asked
    tok.chat_template = [{"name": "rag", "template": plain}, {"name": "other", "template": plain}]
    with pytest.raises(TemplateError, match="other, rag"):
        load_template("auto", tok)
    tok.chat_template = None


def test_an_answer_that_merges_with_the_prompt_where_a_space_is_put_before_every_text(tmp_path):
    # Like Llama 2's original settings: a space before each piece of text, also after a special token.
    letters = [*"abcdefghijklmnopqrstuvwxyz:\n", "▁"]
    vocab = {piece: i for i, piece in enumerate(["<U>", "<A>", "</s>", *letters, "\n\n", "▁a"])}
    backend = Tokenizer(models.BPE(vocab, [("\n", "\n"), ("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<U>", "<A>"])
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>:\n' }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<A>:\n{% endif %}",
        encoding="utf-8",
    )
    made = load_template(str(path), tok)
    for answer, pieces in (("\nab", ["\n", "a", "b"]), ("b", ["b"]), ("ab", ["a", "b"])):
        (tokens,) = made.encode([Message("user", "q"), Message("assistant", answer)])
        prompt = made.prompt([Message("user", "q")])
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert tok.convert_ids_to_tokens(spans(tokens)[0]) == [*pieces, "</s>"]


# ---------------------------------------------------------------- plain text


def test_texts_keep_every_token_as_a_target_once():
    tok = small_tokenizer(bos="<s>", add_bos=True)
    rng = random.Random(6)
    texts = ["x", "", WORDS, *(" ".join(m.content for m in conversation(rng)[0]) for _ in range(10))]
    for limit in (None, 8, 50):
        made = load_template("auto", tok, max_length=limit)
        for text, pieces in zip(texts, made.encode_texts([Example(text=t) for t in texts]), strict=True):
            if not text:
                assert pieces == Refused("empty text")
                continue
            assert isinstance(pieces, list)
            expected = tok.encode(text) + [tok.eos_token_id]
            assert expected[0] == tok.bos_token_id
            targets = [i for p in pieces for i, w in zip(p.ids[1:].tolist(), p.weights[1:].tolist(), strict=True) if w]
            assert targets == expected[1:]
            assert all(isinstance(p, Tokens) and len(p) <= (limit or 10**9) for p in pieces)
            for before, after in itertools.pairwise(pieces):
                assert after.ids[0] == before.ids[-1]
                assert after.weights[0] == 0
    broken, fine = load_template("auto", tok).encode_texts([Example(text="a\udc00"), Example(text="b")])
    assert isinstance(broken, Refused)
    assert broken.reason == "broken characters"
    assert isinstance(fine, list)
    (without,) = load_template("auto", tok).encode_texts([Example(text="one two")], append_eos=False)
    assert isinstance(without, list)
    assert without[0].ids.tolist() == tok.encode("one two")
    assert np.all(without[0].weights == 1)
