"""Weights of parts of an answer. Oracles: token positions worked by hand, the tokenizer's own offsets in the text that
`apply_chat_template` renders, and the same row without weights."""

from __future__ import annotations

import io
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from template_cases import conversation, small_tokenizer
from test_template import CASES, IDS, _exact, _loaded

from tiny_runs import tiny_job
from tunery.data.examples import from_dict, to_dict
from tunery.data.formats import RowError, openai
from tunery.data.spans import BOUNDARY, factors
from tunery.data.template import load_template
from tunery.inspect import inspect
from tunery.models.load import ModelConfig, load_tokenizer
from tunery.objectives import bco, dpo, kto, reward, sft
from tunery.read import read_data
from tunery.types import Example, Message, Refused, Span

ASKED = Message("user", "2 * 21?")


def said(*parts: tuple[str, float | None], **more) -> Message:
    """An answer in parts, each with its weight."""
    content = [{"type": "text", "text": text, "weight": weight} for text, weight in parts]
    return openai.parse({"messages": [{"role": "assistant", "content": content, **more}]}, {}, {}).messages[0]


def trained(tok, sequences) -> list[tuple[str, float]]:
    (tokens,) = sequences
    first = int(np.flatnonzero(tokens.weights)[0])
    return [(tok.decode([i]), w) for i, w in zip(tokens.ids.tolist(), tokens.weights.tolist(), strict=True)][first:]


# ---------------------------------------------------------------- by hand, on real tokenizers


ANSWER = said(("It is", 0.5), (" 42", 2), (", yes", 0), (".", None))
BY_HAND = {
    ("qwen2.5", "auto"): [("It", 0.5), (" is", 0.5), (" ", 2), ("4", 2), ("2", 2), (",", 0), (" yes", 0), (".", 1),
                          ("<|im_end|>", 1), ("\n", 0)],
    ("llama3.1", "auto"): [("It", 0.5), (" is", 0.5), (" ", 2), ("42", 2), (",", 0), (" yes", 0), (".", 1),
                           ("<|eot_id|>", 1)],
    ("gpt2", "chatml"): [("It", 0.5), (" is", 0.5), (" 42", 2), (",", 0), (" yes", 0), (".", 1),
                         ("<|endoftext|>", 1), ("\n", 0)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "template"), BY_HAND, ids="-".join)
def test_by_hand(name, template):
    tok, made = _loaded(name, template)
    assert trained(tok, made.encode([ASKED, ANSWER])) == BY_HAND[name, template]


def test_by_hand_on_the_embedded_tokenizer():
    tok = load_tokenizer(ModelConfig(name="builtin:tiny"))
    made = load_template("auto", tok)
    assert trained(tok, made.encode([ASKED, ANSWER])) == [
        ("I", 0.5), ("t", 0.5), (" is", 0.5), (" ", 2), ("4", 2), ("2", 2), (",", 0), (" y", 0), ("es", 0), (".", 1),
        ("<|im_end|>", 1), ("\n", 0),
    ]  # fmt: skip


def test_the_space_before_a_word_is_not_asked():
    """GPT-2's " 42" is one token, on whichever side of the boundary its space was written."""
    tok, made = _loaded("gpt2", "chatml")
    for parts in ([("It is ", 0), ("42", 2)], [("It is", 0), (" 42", 2)]):
        assert trained(tok, made.encode([ASKED, said(*parts)]))[0] == (" 42", 2)
    for parts in ([("It is ", 2), ("42", 0)], [("It is", 2), (" 42", 0)]):
        assert (" 42", 0) in trained(tok, made.encode([ASKED, said(*parts)]))


def test_a_token_of_two_parts_takes_the_larger_weight():
    tok, made = _loaded("gpt2", "chatml")
    for parts in ([("It is 4", 0), ("2", 0.25)], [("It is 4", 0.25), ("2", 0)]):
        assert (" 42", 0.25) in trained(tok, made.encode([ASKED, said(*parts)]))
    text, offsets = "ab  c", [(0, 2), (2, 2), (3, 5)]  # the middle token's space is no character to its tokenizer
    assert factors(text, offsets, [(1, 4, 3.0)]).tolist() == [3.0, 1.0, 1.0]
    assert factors(text, [(0, 2), (4, 4), (4, 5)], [(2, 4, 3.0)]).tolist() == [1.0, 3.0, 1.0]


# ---------------------------------------------------------------- any template, any text


def in_parts(rng: random.Random, message: Message) -> Message:
    """The message with weights for random parts of its content, some of its rest without."""
    cuts = sorted(rng.sample(range(len(message.content) + 1), min(3, len(message.content) + 1)))
    spans = [Span(a, b, rng.choice([0.0, 0.5, 3.0])) for a, b in itertools.pairwise(cuts) if rng.random() < 0.7]
    return replace(message, spans=tuple(spans))


@pytest.mark.parametrize(("name", "template", "tools", "reasoning"), CASES, ids=IDS)
def test_every_character_finds_its_tokens(name, template, tools, reasoning):
    """The last answer of random conversations: its content stands once behind the prompt's end, and the tokenizer's
    offsets say which token holds which of its characters."""
    tok, made = _loaded(name, template)
    rng, seen = random.Random(2), 0
    for turn in range(40):
        messages, defs = conversation(rng, tools=tools, reasoning=reasoning)
        messages[-1] = in_parts(rng, messages[-1])
        if not all(_exact(tok, m.content) and _exact(tok, m.reasoning or "") for m in messages):
            continue
        plain = made.encode([*messages[:-1], replace(messages[-1], spans=())], defs, train="last")[0]
        (tokens,) = made.encode(messages, defs, train="last")
        assert tokens.ids.tolist() == plain.ids.tolist()
        text = tok.decode(plain.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded.input_ids != plain.ids.tolist():
            continue  # it does not write what it read
        end = encoded.offset_mapping[int(np.flatnonzero(plain.weights)[-1])][0]
        at = text.rindex(messages[-1].content, 0, end)
        of_character = np.full(len(text), 1.0)
        for span in messages[-1].spans:
            of_character[at + span.start : at + span.end] = span.weight
        for token, ((a, b), before, after) in enumerate(
            zip(encoded.offset_mapping, plain.weights, tokens.weights, strict=True)
        ):
            letters = [i for i in range(a, b) if not text[i].isspace()]
            if letters:
                assert after == before * max(of_character[letters]), (turn, token)
                seen += 1
    assert seen > 300 or name in ("stories260K", "TinyStories-656K", "llama2")


@pytest.mark.parametrize(("name", "template", "tools", "reasoning"), CASES, ids=IDS)
def test_whole_texts_and_look_alikes(name, template, tools, reasoning):
    """A weight for all of an answer's content is one for all its tokens but those that the template writes; and parts
    that are cut anywhere, within what looks like a special token too, leave the tokens as they are."""
    _, made = _loaded(name, template)
    rng = random.Random(3)
    for _ in range(20):
        messages, defs = conversation(rng, tools=tools, reasoning=reasoning, alike=True)
        try:
            plain = made.encode(messages, defs)
        except Exception:  # the tests of templates say why
            continue
        cut = [in_parts(rng, m) if m.role == "assistant" and m.content else m for m in messages]
        again = made.encode(cut, defs)
        assert [t.ids.tolist() for t in again] == [t.ids.tolist() for t in plain]
        whole = [
            replace(m, spans=(Span(0, len(m.content), 0.5),)) if m.role == "assistant" and m.content else m
            for m in messages
        ]
        weights = {weight for tokens in made.encode(whole, defs) for weight in tokens.weights.tolist()}
        assert 0.5 in weights <= {0.0, 0.5, 1.0}


def test_reasoning_has_weights_of_its_own():
    tok, made = _loaded("qwen3", "auto")
    parts = [
        {"type": "reasoning", "text": "Twice 21.", "weight": 0},
        {"type": "text", "text": "Twice 21."},
    ]
    row = {"messages": [{"role": "user", "content": "2 * 21?"}, {"role": "assistant", "content": parts}]}
    example = openai.parse(row, {}, {})
    (tokens,) = made.encode(example.messages)
    text = tok.decode(tokens.ids[tokens.weights > 0])
    assert text == "<think>\n</think>\n\nTwice 21.<|im_end|>"  # the period takes the line break with it
    assert "Twice 21.\n</think>" in tok.decode(tokens.ids)


def test_a_prompt_that_opens_the_reasoning(tmp_path):
    """The turn is not what the template writes, but what inference sees: parts are found in that."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>"
        "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A><think>\n{% endif %}"
    )
    tok = small_tokenizer(("<A>", "<U>"))
    spans = (Span(0, 5, 0.0, "reasoning"), Span(4, 7, 0.5))
    messages = [Message("user", "Why?"), Message("assistant", "It is so.", reasoning="First. Then.", spans=spans)]
    (tokens,) = load_template(str(path), tok).encode(messages)
    weights = {w: tok.decode(tokens.ids[tokens.weights == w]) for w in (0.5, 1.0)}
    assert tok.decode(tokens.ids) == "<U>Why?<A><think>\nFirst. Then.\n</think>\n\nIt is so.</s>"
    assert weights[1.0].startswith(". Then.\n</think>\n\nIt") and weights[1.0].endswith("o.</s>")
    assert weights[0.5].strip() in ("s s", "is s")  # as the small tokenizer cuts it


# ---------------------------------------------------------------- beside other weights


def test_a_message_and_its_parts_multiply():
    tok, made = _loaded("qwen2.5", "auto")
    twice = [*trained(tok, made.encode([ASKED, replace(ANSWER, weight=2.0)]))]
    assert twice == [(text, 2 * weight) for text, weight in BY_HAND["qwen2.5", "auto"]]
    later = [ASKED, Message("assistant", "42.")]
    (tokens,) = made.encode([ASKED, replace(ANSWER, weight=0.0), *later])
    assert tok.decode(tokens.ids[tokens.weights > 0]) == "42.<|im_end|>"
    (tokens,) = made.encode([ASKED, ANSWER, *later], train="last")
    assert tok.decode(tokens.ids[tokens.weights > 0]) == "42.<|im_end|>"
    (tokens,) = made.encode([ASKED, ANSWER, *later], train="all")
    assert tok.decode(tokens.ids[tokens.weights != 1]) == "It is 42, yes"


def test_what_the_template_does_not_train_stays_untrained(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<A>note: {% generation %}{{ m.content }}{% endgeneration %}</s>"
        "{% else %}<U>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    )
    tok = small_tokenizer(("<A>", "<U>"))
    made = load_template(str(path), tok)
    for asked in ("Why?", "<A> is text"):
        (tokens,) = made.encode([Message("user", asked), said(("Because", 3), (" so.", None))])
        assert tok.decode(tokens.ids[tokens.weights == 3]).strip() == "Because"
        assert tok.decode(tokens.ids[tokens.weights == 1]) == " so.</s>"


def test_an_answer_that_loses_its_end_keeps_the_weights_of_the_rest():
    tok = small_tokenizer(("<|im_start|>", "<|im_end|>"))
    answer = said(("one two three four", 0), (" five six seven eight nine ten eleven twelve", 2))
    messages = [Message("user", "Count."), answer]
    whole = load_template("chatml", tok).encode(messages)[0]
    for limit in range(len(whole) - 1, len(whole) - 34, -3):
        (tokens,) = load_template("chatml", tok, max_length=limit, too_long="truncate").encode(messages)
        assert tokens.extra["truncated"] and len(tokens) <= limit
        heavy = tok.decode(tokens.ids[tokens.weights == 2])
        assert " five six seven eight nine ten eleven twelve".startswith(heavy)
        assert tok.decode(tokens.ids[tokens.weights == 1]) == "<|im_end|>"


def test_what_cannot_be_found_is_refused(tmp_path):
    path = tmp_path / "own.jinja"
    shouted = "{% for m in messages %}<A>{{ m.content%s }}</s>{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
    tok = small_tokenizer(("<A>",))
    for change in ("|replace('It is', 'It  is')", "+ m.content", "|length ~ m.content"):
        path.write_text(shouted.replace("%s", change))
        (refused,) = load_template(str(path), tok).encode_many([Example([Message("user", "It is"), ANSWER])])
        if "replace" in change:  # what is changed lies within one part
            assert not isinstance(refused, Refused)
        else:
            assert isinstance(refused, Refused) and refused.reason == "weights do not apply", change
    _, made = _loaded("qwen2.5", "auto")
    first = said(("\n\nIt", 0), (" is.", 2))  # its line breaks and the prompt's are one token
    for message, fits in ((first, False), (replace(first, spans=()), True)):
        (made_of_it,) = made.encode_many([Example([ASKED, message])])
        assert fits or (isinstance(made_of_it, Refused) and made_of_it.reason == "prompt and answer share a token")
        assert not fits or not isinstance(made_of_it, Refused)
    odd = replace(ANSWER, content=ANSWER.content + BOUNDARY["content"])
    (refused,) = made.encode_many([Example([ASKED, odd])])
    assert isinstance(refused, Refused) and refused.reason == "reserved characters"


# ---------------------------------------------------------------- rows


def test_rows_say_weights_in_parts():
    parts = [
        {"type": "reasoning", "text": "Hm."},
        {"type": "text", "text": "So "},
        {"type": "reasoning", "text": "Aha.", "loss_weight": 0},
        {"type": "text", "text": "42", "weight": 2},
        {"type": "text", "text": "", "weight": 3},
    ]
    message = openai.parse({"messages": [{"role": "assistant", "content": parts, "weight": 0.5}]}, {}, {}).messages[0]
    assert (message.content, message.reasoning, message.weight) == ("So 42", "Hm.Aha.", 0.5)
    assert message.spans == (Span(3, 7, 0.0, "reasoning"), Span(3, 5, 2.0))
    pair = openai.parse({"prompt": "Q", "chosen": [{"role": "assistant", "content": parts}], "rejected": "No."}, {}, {})
    assert pair.messages[-1].spans == message.spans
    assert from_dict(json.loads(json.dumps(to_dict(pair)))) == pair


@pytest.mark.parametrize(
    ("role", "part", "why"),
    [
        ("assistant", {"type": "text", "text": "x", "weight": -1}, "-1, expected a number of 0 or more"),
        ("assistant", {"type": "text", "text": "x", "weight": "2"}, "'2', expected a number"),
        ("assistant", {"type": "text", "text": "x", "weight": float("inf")}, "inf, expected"),
        ("assistant", {"type": "text", "text": "x", "weight": False}, "False, expected"),
        ("user", {"type": "text", "text": "x", "weight": 0}, "a part of a user message"),
        ("assistant", {"type": "image", "image": "x.png", "weight": 1}, "a part of type image"),
    ],
)
def test_wrong_weights_are_refused(role, part, why):
    with pytest.raises(RowError) as caught:
        openai.parse({"messages": [{"role": role, "content": [part]}]}, {}, {})
    assert caught.value.reason == "bad weight" and why in caught.value.detail


def test_reasoning_is_said_once():
    message = {"role": "assistant", "reasoning_content": "a", "content": [{"type": "reasoning", "text": "b"}]}
    with pytest.raises(RowError, match="reasoning_content beside"):
        openai.parse({"messages": [message]}, {}, {})


def test_from_a_file_to_colours_and_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNERY_CACHE", str(tmp_path / "cache"))
    parts = [
        {"type": "text", "text": "It is "}, {"type": "text", "text": "42", "weight": 0.5},
        {"type": "text", "text": ".", "weight": 0},
    ]  # fmt: skip
    row = {"messages": [{"role": "user", "content": "2 * 21?"}, {"role": "assistant", "content": parts}]}
    wrong = {"messages": [row["messages"][0], {"role": "assistant", "content": [{**parts[1], "weight": -1}]}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, wrong, *[row] * 20])), encoding="utf-8")
    job = tiny_job(tmp_path, data={"train": str(path), "eval": None, "cache": True})
    first, again = read_data(job).data, read_data(job).data
    assert [(r.row, r.reason) for r in first.report.refused] == [(2, "bad weight")]
    for data in (first, again):
        (tokens,) = data.train.sequences(0)
        assert tokens.weights[-8:].tolist() == [
            1,
            1,
            1,
            0.5,
            0.5,
            0,
            1,
            0,
        ]  # "t", " is", " ", "4", "2", ".", end, line break
    out = io.StringIO()
    inspect(job, Console(file=out, width=200, color_system="standard", force_terminal=True), rows=1)
    assert "\x1b[33m4" in out.getvalue() and "\x1b[1;32m is" in out.getvalue()


# ---------------------------------------------------------------- objectives


def test_who_uses_them():
    tok = load_tokenizer(ModelConfig(name="builtin:tiny"))
    template = load_template("auto", tok)
    chat = Example([ASKED, ANSWER])
    pair = Example([ASKED, ANSWER], rejected=[Message("assistant", "It is 24.")], meta={"shared": 1})
    thumb = replace(chat, label=True)

    def weights(kind, example):
        objective = kind.Objective(kind.Config())
        (row,) = objective.rows([example], template)
        said = getattr(objective, "unused", lambda _: None)(example)
        return sorted(set(row[0].weights.tolist())), said

    for kind, example in ((sft, chat), (dpo, pair)):
        assert weights(kind, example) == ([0.0, 0.5, 1.0, 2.0], None)
    for kind, example in ((kto, thumb), (bco, thumb), (kto, pair), (reward, pair)):
        values, remark = weights(kind, example)
        assert values == [0.0, 1.0] and "weights of parts" in remark
    assert kto.Objective(kto.Config()).unused(replace(thumb, messages=[ASKED, Message("assistant", "42")])) is None
