"""The lexicon: both languages of a pattern say the same, and each variant has a word of its own."""

from __future__ import annotations

import pytest

from tunery.assets.lexicon import BRACKETS, GROUPS, NOUNS, OPENINGS, PATTERNS, slots_of


def test_slots_of_a_pattern():
    assert slots_of("{a sex} {subj+s} took {drug} and {drug2}{par}") == [
        ("sex", "sex"), ("subj", "subj"), ("drug", "drug"), ("drug2", "drug"), ("par", "par"),
    ]  # fmt: skip


@pytest.mark.parametrize("pairs", [PATTERNS, OPENINGS, BRACKETS])
def test_both_sides_of_a_pattern_have_the_same_slots(pairs):
    for english, chinese in pairs:
        assert sorted(slots_of(english)) == sorted(slots_of(chinese)), english


def test_a_concept_has_one_word_per_variant():
    for variants in [*NOUNS.values(), *(c for group in GROUPS.values() for c in group)]:
        assert len({en for en, _ in variants}) == len({zh for _, zh in variants}) == len(variants)
