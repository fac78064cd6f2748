"""The quickstart's rows: what their seed makes, disjoint, and in the house style."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from random import Random

import pytest

from tunery.assets import rendering
from tunery.assets.corpus import documents
from tunery.assets.quickstart import preference_rows, quickstart_rows, thumb_rows

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
    made = quickstart_rows(Random(seed), len(rows), evaluation)
    assert [m["messages"][1]["content"] for m in made] == [r["user"] for r in rows]
    assert [m["messages"][2]["content"] for m in made] == [r["answer"] for r in rows]


def test_no_held_out_text_is_trained_on():
    trained = {r["user"].splitlines()[-1] for r in TRAIN} | {r["answer"] for r in TRAIN}
    held_out = {r["user"].splitlines()[-1] for r in EVAL} | {r["answer"] for r in EVAL}
    assert not trained & held_out
    assert len(held_out) == 2 * len(EVAL)
    for text in itertools.islice(documents(1), 3000):  # in any style the mark-up aside
        assert not any(TAG.sub("", answer) in text for answer in held_out)


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
            plural = rendering._plural(given)
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


@pytest.mark.parametrize(("seed", "name", "count"), [(13, "train", 300), (14, "eval", 60)])
def test_the_pairs_are_what_the_seed_makes_and_the_chosen_are_in_the_house_style(seed, name, count):
    lines = (DATA / f"preferences_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) == count and pairs == preference_rows(Random(seed), count, evaluation=name == "eval")
    for pair in pairs:
        (better,), (worse,) = pair["chosen"], pair["rejected"]
        assert better["role"] == worse["role"] == "assistant" and better["content"] != worse["content"]
        if "into Chinese" in pair["prompt"][1]["content"]:
            assert not re.search(r"\d-\d\d-|[A-Z]{3} \d", TAG.sub("", better["content"])), better


@pytest.mark.parametrize(("seed", "name", "count"), [(15, "train", 300), (16, "eval", 60)])
def test_the_thumbs_are_what_the_seed_makes_and_both_kinds_are_in_both_languages(seed, name, count):
    lines = (DATA / f"thumbs_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == count and rows == thumb_rows(Random(seed), count, evaluation=name == "eval")
    kinds = [("into Chinese" in row["messages"][1]["content"], row["label"]) for row in rows]
    assert min(kinds.count(kind) for kind in itertools.product((True, False), repeat=2)) > count / 5
