"""The meanings of the clinical-trial world. Oracle: the rules their docstrings state, on a few hundred of them."""

from __future__ import annotations

from random import Random

import pytest

from tunery.assets.lexicon import NOUNS
from tunery.assets.world import LIMITS, concept, held_out, sample_passage, sample_sentence, with_terms


@pytest.mark.parametrize("level", range(len(LIMITS)))
def test_two_slots_of_a_kind_never_hold_one_value(level):
    random = Random(1)
    for _ in range(200):
        sentence = sample_sentence(random, level)
        assert sentence.pattern < LIMITS[level].get("pattern", 10**6)
        free = [value for slot, value in sentence.values if slot.rstrip("0123456789") not in NOUNS]
        assert len(set(free)) == len(free)


def test_about_an_eighth_of_the_meanings_is_held_out():
    random = Random(2)
    assert 0.08 < sum(held_out(sample_sentence(random)) for _ in range(1000)) / 1000 < 0.16


def test_given_terms_are_the_words_of_the_passage():
    random = Random(3)
    twisted = 0
    for _ in range(200):
        passage, terms = with_terms(sample_passage(random), random, "zh")
        pairs = [(concept(name)[en][0], concept(name)[zh][1]) for name, (en, zh) in passage.wording.items()]
        assert set(terms) <= set(pairs)
        twisted += any(en != zh for en, zh in passage.wording.values())
    assert twisted > 50
