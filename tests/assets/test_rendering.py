"""Passages in words. Oracle: sentences written by hand, in the house style and in another."""

from __future__ import annotations

import pytest

from tunery.assets.lexicon import BRACKETS, PATTERNS
from tunery.assets.rendering import Style, han_number, render
from tunery.assets.world import Passage, Sentence


@pytest.mark.parametrize(("n", "words"), [(2, "两"), (10, "十"), (12, "十二"), (20, "二十"), (34, "三十四")])
def test_chinese_number_words(n, words):
    assert han_number(n) == words


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
    sentence = Sentence(pattern, None, bracket, tuple(values.items()))
    passage = Passage((sentence,), (("money", "b"),), "p", " ", {"sponsor": (0, 0), "site": (0, 2), "pay.5": (0, 0)})
    assert render(passage, "en") == (
        "<p>The sponsor will pay the site <b>CNY 12,500</b> for training (since 05 Mar 2024).</p>"
    )
    assert render(passage, "zh") == "<p>申办方将向医院支付<b>12,500元</b>的培训费用（自2024年3月5日起）。</p>"
    sloppy = Style("iso", "sign", "other", "words", "words", "words", tags=False)
    assert (
        render(passage, "zh", sloppy, passage.aligned("zh"))
        == "申办方将向研究中心支付¥12,500的培训费用(自2024-03-05起)。"
    )
