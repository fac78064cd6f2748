"""Oracle: answers whose worth a person can see."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tunery.config import build, kinds, load_kind, validate
from tunery.errors import ConfigError, RewardError
from tunery.rewards.math import last_boxed, last_number
from tunery.types import Answer, Message


def answer(text: str, truth=None, question: str = "What?", ids: int = 3, **columns) -> Answer:
    return Answer([Message("user", question)], text, list(range(ids)), "stop", truth, columns, "rows.jsonl:7")


def worth(kind: str, *answers: Answer, **options) -> list[float | None]:
    config = validate(load_kind("rewards", kind).Config, {"kind": kind, **options})
    return build("rewards", config).score(answers)


def test_every_kind_has_what_a_kind_has():
    known = {"exact", "regex", "tags", "math", "length", "language", "similarity", "judge", "function"}
    assert known <= set(kinds("rewards"))
    for kind in kinds("rewards"):
        module = load_kind("rewards", kind)
        assert module.Config.model_fields["kind"].default == kind and callable(module.Reward)


def test_exact():
    assert worth("exact", answer(" forty  two\n", "forty two"), answer("43", "42")) == [1.0, 0.0]
    assert worth("exact", answer("Yes", "yes")) == [0.0] and worth("exact", answer("Yes", "yes"), ignore_case=True) == [
        1.0
    ]
    found = worth("exact", answer("<a>1</a> no, <a>2</a>", 2), answer("none", 2), pattern="<a>(.*?)</a>")
    assert found == [1.0, 0.0]
    assert worth("exact", answer("x", None, key="x"), column="key") == [1.0]
    with pytest.raises(RewardError, match=r"rows.jsonl:7: the row has no ground truth"):
        worth("exact", answer("x"))
    with pytest.raises(RewardError, match="no column 'kay'"):
        worth("exact", answer("x", key="x"), column="kay")
    with pytest.raises(ConfigError, match="no regular expression"):
        worth("exact", answer("x", "x"), pattern="[")


def test_regex():
    assert worth("regex", answer("a\nb c"), answer("abd"), pattern="a.b") == [1.0, 0.0]
    assert worth("regex", answer("xay"), answer("a"), pattern="a", whole=True) == [0.0, 1.0]


TAGGED = {
    "<think>hm</think><answer>1</answer>": (1.0, 1.0),
    "\n<think>\nhm</think>\n<answer>1</answer> ": (1.0, 1.0),
    "<think>hm</think> so <answer>1</answer>": (0.0, 1.0),
    "<think>hm</think><answer>1</answer> That is it.": (0.0, 1.0),
    "<answer>1</answer><think>hm</think>": (0.0, 0.5),
    "<think>hm</think><answer>1": (0.0, 0.75),
    "<think></think><answer>1</answer>": (0.0, 1.0),
    "<think>a</think><think>b</think><answer>1</answer>": (0.0, 0.5),
    "nothing": (0.0, 0.0),
}


@pytest.mark.parametrize("text", TAGGED)
def test_tags(text):
    assert (*worth("tags", answer(text)), *worth("tags", answer(text), partial=True)) == TAGGED[text]


NUMBERS = {
    "so it is 42.": 42,
    "12-5": 5,
    "between 3 and -4.5": Fraction(-9, 2),
    "x = -7": -7,
    "1,234,567 people": 1234567,
    "3/4 of it": Fraction(3, 4),
    "\\frac{3}{4}": Fraction(3, 4),
    "-\\frac{1}{2}": Fraction(-1, 2),
    "12.5%": Fraction(1, 8),
    "2e3 things": 2000,
    "$1,000.50": Fraction("1000.5"),
    ".5": Fraction(1, 2),
    "no number": None,
    "1/0": None,
    "3 - 4": 4,
    "x=-4": -4,
    "7 " + "9" * 5000: 7,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text):
    assert last_number(text) == NUMBERS[text]


def test_math():
    gsm8k = "She has 3 * 4 = <<3*4=12>>12 apples.\n#### 12"
    assert worth("math", answer("That makes 12 apples.", gsm8k), answer("12 or 13", gsm8k)) == [1.0, 0.0]
    assert worth("math", answer("\\boxed{0.75} (of 4)", "\\boxed{\\frac{3}{4}}")) == [1.0]
    assert worth("math", answer("12", "12"), answer("\\boxed{12}", "12"), boxed=True) == [0.0, 1.0]
    assert worth("math", answer("0.3333333", "1/3"), answer("0.33", "1/3")) == [1.0, 0.0]
    assert worth("math", answer("0.33", "1/3"), tolerance=0.02) == [1.0]
    assert worth("math", answer("\\boxed{x + 1}", "x+1"), answer("none", 12)) == [1.0, 0.0]
    assert last_boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}" and last_boxed("\\boxed{1") is None


def test_length():
    assert worth("length", answer("", ids=10), answer("", ids=5), answer("", ids=25), target=10) == [1.0, 0.5, 0.0]
    assert worth("length", answer("one two three"), unit="words", target=3) == [1.0]
    assert worth("length", answer("abcd"), unit="characters", target=8) == [0.5]
    # DAPO's soft punishment by hand: nothing up to 16, then a straight line to -1 at 20
    counts = (16, 17, 19, 20, 21)
    assert worth("length", *(answer("", ids=n) for n in counts), limit=20, buffer=4) == [0, -0.25, -0.75, -1, -1]
    for options in ({}, {"target": 1, "limit": 2}, {"limit": 2, "buffer": 3}):
        with pytest.raises(ConfigError):
            worth("length", answer(""), **options)


def test_language():
    assert worth("language", answer("这是 ok"), answer("你好"), answer("123"), script="zh") == [0.5, 1.0, 0.0]
    assert worth("language", answer("Straße, déjà vu"), script="en") == [1.0]
    assert worth("language", answer("こんにちは世界"), script="ja") == [1.0]
    asked = (
        answer("好", question="请翻译成中文 OK?"),
        answer("fine", question="How are you? 好"),
        answer("x", question="1+1="),
    )
    assert worth("language", *asked) == [1.0, 1.0, None]


def test_similarity():
    same, other = (
        answer("the cat sat on the mat", "the cat sat on the mat"),
        answer("dogs bark", "the cat sat on the mat"),
    )
    for metric in ("chrf", "bleu"):
        best, worst = worth("similarity", same, other, metric=metric)
        assert best == pytest.approx(1.0) and worst is not None and worst < 0.2
    (chinese,) = worth("similarity", answer("患者接受了治疗", "患者接受了治疗。"), metric="bleu")
    assert chinese is not None and 0.5 < chinese < 1
