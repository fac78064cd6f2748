"""The pretraining documents: a function of their seed, and never about a held-out meaning."""

from __future__ import annotations

import itertools

from tunery.assets import world
from tunery.assets.corpus import documents


def test_documents_are_a_function_of_the_seed():
    assert list(itertools.islice(documents(3), 50)) == list(itertools.islice(documents(3), 50))
    assert list(itertools.islice(documents(3), 5)) != list(itertools.islice(documents(4), 5))


def test_every_pretraining_sentence_is_trainable(monkeypatch):
    asked = []
    monkeypatch.setattr(world, "held_out", lambda sentence: asked.append(sentence) or False)
    assert list(itertools.islice(documents(1), 50))
    assert len(asked) > 30
