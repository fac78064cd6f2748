"""Oracle: the template's own encoding of each side as a plain conversation; numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from assets_path import assets
from tiny_model import TEMPLATE, byte_tokenizer
from tunery.data.collate import collate
from tunery.data.template import load_template
from tunery.pairs import answer_lengths, count_pairs, encode_pairs, pair_metrics, sequence_logps, split_pairs
from tunery.types import Example, Message, Refused, Tokens, ToolCall

# Shows no more than the first word of assistant turns before the last message, and tool calls as text.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split(' ')[0] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def template(source: str = TEMPLATE, **options):
    return load_template("auto", byte_tokenizer(source), **options)


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str, **more) -> Message:
    return Message("assistant", text, **more)


def pair(*messages: Message, rejected, **meta) -> Example:
    return Example(list(messages), rejected=list(rejected), meta=meta)


def encoded(example: Example, chat=None) -> list[Tokens] | Refused:
    return encode_pairs([example], chat or template())[0]


def trained(tokens: Tokens, chat=None) -> str:
    return (chat or template()).tokenizer.decode(tokens.ids[tokens.weights != 0])


def text(tokens: Tokens) -> str:
    return template().tokenizer.decode(tokens.ids)


def test_the_answers_are_trained_and_nothing_before():
    example = pair(user("one"), bot("first"), user("two"), bot("good"), rejected=[bot("bad")])
    chat = template()
    chosen, rejected = encoded(example)
    assert [trained(t) for t in (chosen, rejected)] == ["good<|im_end|>", "bad<|im_end|>"]
    for tokens, answer in ((chosen, "good"), (rejected, "bad")):
        (alone,) = chat.encode([*example.messages[:-1], bot(answer)], train="last")
        assert (tokens.ids == alone.ids).all() and (tokens.weights == alone.weights).all()


def test_several_final_turns_and_different_numbers_of_them():
    calls = [bot("look", tool_calls=(ToolCall("f", {}),)), Message("tool", "42"), bot("it is 42")]
    source = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}[f]{% endfor %}")
    chat = template(source)
    example = pair(user("what?"), *calls, rejected=[bot("no idea")])
    chosen, rejected = encoded(example, chat)
    assert trained(chosen) == "look[f]<|im_end|>it is 42<|im_end|>" and trained(rejected) == "no idea<|im_end|>"
    # turns in common belong to the prompt, where the data's format says so
    shared = pair(user("what?"), *calls, rejected=[bot("it is 41")], shared=3)
    chosen, rejected = encoded(shared, chat)
    assert trained(chosen) == "it is 42<|im_end|>" and trained(rejected) == "it is 41<|im_end|>"
    assert "look[f]" in text(rejected)
    weighed = pair(
        user("what?"), bot("a b", weight=0.0), Message("tool", "1"), bot("c", weight=0.5), rejected=[bot("d")]
    )
    chosen, rejected = encoded(weighed, chat)
    assert trained(chosen) == "c<|im_end|>" and chosen.weights.max() == 0.5 and rejected.weights.max() == 1.0


def test_a_template_that_rewrites_history_gives_one_sequence_an_answer():
    chat = template(REWRITES)
    example = pair(user("1"), bot("early words"), user("2"), bot("good answer"), rejected=[bot("bad answer")])
    chosen, rejected = encoded(example, chat)
    assert trained(chosen) == "good answer<|im_end|>" and trained(rejected) == "bad answer<|im_end|>"
    assert "early<|im_end|>" in text(chosen) and "words" not in text(rejected)
    several = pair(user("1"), bot("first step"), user("go on"), bot("second"), rejected=[bot("no")], shared=1)
    refused = encoded(several, chat)
    assert isinstance(refused, Refused) and refused.reason == "answer in several sequences"
    assert "chosen" in refused.detail


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5"])
def test_real_templates_give_two_sequences(name):
    from transformers import AutoTokenizer

    chat = load_template("auto", AutoTokenizer.from_pretrained(str(assets() / "tokenizers" / name)))
    example = pair(user("Hi"), bot("Hello."), user("2 + 2?"), bot("It is 4."), rejected=[bot("It is five, I think.")])
    made = encoded(example, chat)
    assert isinstance(made, list) and len(made) == 2
    chosen, rejected = (trained(tokens, chat) for tokens in made)
    assert "It is 4." in chosen and "It is five, I think." in rejected and "Hello" not in chosen + rejected


def test_rows_that_are_no_pairs_are_refused_with_the_reason():
    same = pair(user("q"), bot("a"), rejected=[bot("a")])
    rows = [
        Example(text="plain"), Example([user("q"), bot("a")]), pair(user("q"), rejected=[bot("b")]),
        pair(user("q"), bot("a"), rejected=[user("b")]), same, pair(user("q"), bot("a"), rejected=[bot(" ")]),
        pair(user("q"), bot("a"), user("u"), rejected=[bot("b")], shared=1),
        pair(user("q"), bot("a"), rejected=[bot("b"), user("u")]),
        pair(user("q"), bot("a"), rejected=[user("p"), bot("b")], shared=0),
        pair(user("q"), bot("a"), rejected=[bot("b")]),
    ]  # fmt: skip
    *refused, made = encode_pairs(rows, template())
    assert [r.reason for r in refused] == [
        "wrong objective", "no rejected answer", "no chosen answer", "no rejected answer", "same answers",
        "empty answer", "no chosen answer", "no rejected answer", "different prompts",
    ]  # fmt: skip
    assert "objective: pretrain" in refused[0].detail and "the rejected answer" in refused[5].detail
    assert (
        "ends with a turn of the role user" in refused[7].detail
        and "differ in a turn of the role user" in refused[8].detail
    )
    assert len(made) == 2


def test_a_margin_goes_along_and_is_nothing_where_there_is_none():
    rows = [
        pair(user("q"), bot("a"), rejected=[bot("b")], margin=2.5),
        pair(user("q"), bot("c"), rejected=[bot("d")]),
    ]
    pairs = encode_pairs(rows, template())
    batch = collate([tokens for made in pairs for tokens in made])
    assert batch.extra["margin"].tolist() == [2.5, 2.5, 0.0, 0.0]


# ---------------------------------------------------------------- too long


@pytest.mark.parametrize("limit", [300, 170, 120, 90, 60])
@pytest.mark.parametrize(("good", "bad"), [(20, 90), (90, 20), (60, 60), (3, 5), (150, 140)])
def test_both_sides_are_cut_after_the_same_prompt(limit, good, bad):
    history = [user("long ago " * 6), bot("an early answer " * 3), user("please tell me about it " * 5)]
    example = pair(*history, bot("g" * good), rejected=[bot("b" * bad)])
    chat = template(max_length=limit, too_long="truncate")
    made = encoded(example, chat)
    assert isinstance(made, list)
    for tokens, letter in zip(made, "gb", strict=True):
        assert len(tokens) <= limit
        assert set(trained(tokens).removesuffix("<|im_end|>")) == {letter}
    prompts = [tokens.ids[: int(np.flatnonzero(tokens.weights)[0])].tolist() for tokens in made]
    assert prompts[0] == prompts[1]
    whole = encoded(example, template())
    assert isinstance(whole, list)
    cut = max(map(len, whole)) > limit
    assert [bool(tokens.extra.get("truncated")) for tokens in made] == [cut, cut]
    if cut and len(prompts[0]) > 80:  # the prompt had more to give, so the answers are whole
        assert [trained(t) for t in made] == [trained(t) for t in whole]


def test_too_long_to_be_cut_dropped_or_an_error():
    example = pair(user("q"), bot("g" * 50), rejected=[bot("b" * 90)])
    refused = encoded(example, template(max_length=100, too_long="drop"))
    assert isinstance(refused, Refused) and refused.reason == "too long" and "the rejected answer" in refused.detail
    refused = encoded(example, template(max_length=8, too_long="truncate"))
    assert isinstance(refused, Refused) and refused.reason == "too long"


# ---------------------------------------------------------------- streams


def test_sums_metrics_and_counts_by_hand():
    sequences = [
        Tokens(np.arange(5, 5 + n, dtype=np.int32), np.array([0] + [w] * (n - 1), np.float32))
        for n, w in ((3, 1.0), (4, 0.5), (2, 1.0), (5, 1.0))
    ]
    batch = collate(sequences, [0, 0, 1, 1])
    logps = torch.where(batch.weights_T != 0, -1.0, 0.0)
    sums = sequence_logps(batch, logps)
    assert sums.tolist() == [-2.0, -1.5, -1.0, -4.0] and answer_lengths(batch).tolist() == [2, 3, 1, 4]
    chosen, rejected = split_pairs(sums)
    assert chosen.tolist() == [-2.0, -1.0] and rejected.tolist() == [-1.5, -4.0]
    metrics = {name: float(v) / w for name, (v, w) in pair_metrics(chosen, rejected, chosen, rejected).items()}
    assert metrics == {
        "rewards/chosen": -1.5, "rewards/rejected": -2.75, "rewards/accuracies": 0.5, "rewards/margins": 1.25,
        "logps/chosen": -1.5, "logps/rejected": -2.75,
    }  # fmt: skip
    assert float(count_pairs(batch)) == 2.0
