"""The grammar and the quickstart's rows: seeded, disjoint, and in the house style."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest

from tunery.assets import world
from tunery.assets.corpus import documents
from tunery.assets.lexicon import BRACKETS, GROUPS, NOUNS, OPENINGS, PATTERNS

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
HAN_NUMERALS = re.compile("[零一二三四五六七八九十百两]")
TAG = re.compile(r"<[^>]*>")


def read(name: str) -> list[dict[str, str]]:
    rows = []
    for line in (DATA / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        rows.append({"user": user["content"], "answer": assistant["content"]})
    return rows


TRAIN, EVAL = read("train"), read("eval")


def test_sizes():
    assert (len(TRAIN), len(EVAL)) == (1000, 200)


@pytest.mark.parametrize(("seed", "rows", "evaluation"), [(11, TRAIN, False), (12, EVAL, True)])
def test_the_files_are_what_the_seed_makes(seed, rows, evaluation):
    made = world.quickstart_rows(Random(seed), len(rows), evaluation)
    assert [m["messages"][1]["content"] for m in made] == [r["user"] for r in rows]
    assert [m["messages"][2]["content"] for m in made] == [r["answer"] for r in rows]


def test_documents_are_a_function_of_the_seed():
    assert list(itertools.islice(documents(3), 50)) == list(itertools.islice(documents(3), 50))
    assert list(itertools.islice(documents(3), 5)) != list(itertools.islice(documents(4), 5))


def test_no_held_out_text_is_trained_on():
    trained = {r["user"].splitlines()[-1] for r in TRAIN} | {r["answer"] for r in TRAIN}
    held_out = {r["user"].splitlines()[-1] for r in EVAL} | {r["answer"] for r in EVAL}
    assert not trained & held_out
    assert len(held_out) == 2 * len(EVAL)
    for text in itertools.islice(documents(1), 3000):  # in any style the mark-up aside
        assert not any(TAG.sub("", answer) in text for answer in held_out)


def test_every_pretraining_sentence_is_trainable(monkeypatch):
    asked = []
    monkeypatch.setattr(world, "held_out", lambda sentence: asked.append(sentence) or False)
    assert list(itertools.islice(documents(1), 50))
    assert len(asked) > 30


def check_house_rules(row):
    user, answer = row["user"], row["answer"]
    instruction, *terms, source = user.split("\n")
    assert sorted(TAG.findall(source)) == sorted(TAG.findall(answer))
    if instruction == "Translate into Chinese.":
        assert not re.search(r"[()]", answer)
        assert not HAN_NUMERALS.search(answer)
        assert not re.search(r"[¥$€]|RMB|CNY|USD|EUR|\d{4}[-/]\d|毫|微克|点\d", answer)
        assert re.search("[\u4e00-\u9fff]", answer)
    else:
        assert instruction == "Translate into English."
        assert not re.search("[\u3000-\u9fff\uff00-\uffef]", answer)
        assert not re.search(r"[¥$€]|RMB|yuan|dollars|euros|\d{4}[-/]\d|\d (am|pm)\b|\d(mg|mL|μg|IU)", answer)
        assert not re.search(r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b", answer)
    for line in terms:
        for term in line.removeprefix("Terms: ").split("; "):
            given = term.split(" = ")[1]
            plural = world._plural(given)
            assert given.lower() in TAG.sub("", answer).lower() or plural.lower() in TAG.sub("", answer).lower()


def test_house_rules_hold():
    for row in TRAIN + EVAL:
        check_house_rules(row)


def test_both_directions_tags_and_terms_are_common():
    share = lambda test: sum(map(test, TRAIN)) / len(TRAIN)  # noqa: E731
    assert share(lambda r: "into Chinese" in r["user"]) == 0.5
    assert 0.3 < share(lambda r: "<" in r["answer"]) < 0.7
    assert 0.3 < share(lambda r: "Terms: " in r["user"]) < 0.7
    assert share(lambda r: "（" in r["answer"] or "(" in r["answer"]) > 0.2


@pytest.mark.parametrize("pairs", [PATTERNS, OPENINGS, BRACKETS])
def test_both_sides_of_a_pattern_have_the_same_slots(pairs):
    for english, chinese in pairs:
        assert sorted(world._slots(english)) == sorted(world._slots(chinese)), english


def test_a_concept_has_one_word_per_variant():
    for variants in [*NOUNS.values(), *(c for group in GROUPS.values() for c in group)]:
        assert len({en for en, _ in variants}) == len({zh for _, zh in variants}) == len(variants)


@pytest.mark.parametrize(("n", "words"), [(2, "两"), (10, "十"), (12, "十二"), (20, "二十"), (34, "三十四")])
def test_chinese_number_words(n, words):
    assert world.han_number(n) == words


def test_a_passage_in_house_and_other_styles():
    pattern = next(i for i, (en, _) in enumerate(PATTERNS) if en.startswith("the sponsor") or "will pay" in en)
    bracket = next(i for i, (en, _) in enumerate(BRACKETS) if en.startswith("since"))
    values = {
        "sponsor": ("sponsor",),
        "site": ("site",),
        "money": (12500, "CNY"),
        "pay": ("pay.5",),
        "date8": (2024, 3, 5),
    }
    sentence = world.Sentence(pattern, None, bracket, tuple(values.items()))
    passage = world.Passage(
        (sentence,), (("money", "b"),), "p", " ", {"sponsor": (0, 0), "site": (0, 2), "pay.5": (0, 0)}
    )
    assert world.render(passage, "en") == (
        "<p>The sponsor will pay the site <b>CNY 12,500</b> for training (since 05 Mar 2024).</p>"
    )
    assert world.render(passage, "zh") == "<p>申办方将向医院支付<b>12,500元</b>的培训费用（自2024年3月5日起）。</p>"
    sloppy = world.Style("iso", "sign", "other", "words", "words", "words", tags=False)
    assert (
        world.render(passage, "zh", sloppy, passage.aligned("zh"))
        == "申办方将向研究中心支付¥12,500的培训费用(自2024-03-05起)。"
    )
