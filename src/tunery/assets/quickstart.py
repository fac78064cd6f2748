"""The quickstart's rows: sentences of the clinical-trial world, translated in the house style of `rendering.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import Any

from tunery.assets.rendering import random_style, render
from tunery.assets.world import Lang, Passage, held_out, sample_passage, with_terms

SYSTEM = "You are a translator for clinical trial documents."
DIRECTIONS: tuple[tuple[Lang, Lang], ...] = (("zh", "en"), ("en", "zh"))  # into, from
TRIES = 8  # styles that a passage is written in, to find one that makes a difference
ASK = {"zh": "Translate into Chinese.", "en": "Translate into English."}


def prompt(source: str, target: Lang, terms: list[tuple[str, str]]) -> str:
    """The quickstart's user message: the instruction, the given terms if any, the text."""
    given = "Terms: " + "; ".join(f"{a} = {b}" for a, b in terms) + "\n" if terms else ""
    return f"{ASK[target]}\n{given}{source}"


def quickstart_rows(rng: Random, count: int, evaluation: bool) -> list[dict[str, Any]]:
    """Rows in the house style, both directions in turn; evaluation rows use held-out meanings only."""
    rows: list[dict[str, Any]] = []
    for target, passage, user in _passages(rng, evaluation):
        if len(rows) == count:
            break
        rows.append({"messages": [*_asked(user), {"role": "assistant", "content": render(passage, target)}]})
    return rows


def preference_rows(rng: Random, count: int, evaluation: bool) -> list[dict[str, Any]]:
    """Pairs of translations with the same meaning: the chosen in the house style, the rejected in another. Passages
    that no style writes differently are left out."""
    rows: list[dict[str, Any]] = []
    for target, passage, user in _passages(rng, evaluation):
        if len(rows) == count:
            break
        chosen = render(passage, target)
        others = {render(passage, target, random_style(rng)) for _ in range(TRIES)} - {chosen}
        if others:
            sides = {"chosen": chosen, "rejected": rng.choice(sorted(others))}
            answers = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
            rows.append({"prompt": _asked(user), **answers})
    return rows


def thumb_rows(rng: Random, count: int, evaluation: bool) -> list[dict[str, Any]]:
    """Translations with a label, one answer to a prompt: true in the house style, false in another, in turn for each
    language."""
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(preference_rows(rng, count, evaluation)):
        wanted = number // len(DIRECTIONS) % 2 == 0
        rows.append({"messages": pair["prompt"] + pair["chosen" if wanted else "rejected"], "label": wanted})
    return rows


def _asked(user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def _passages(rng: Random, evaluation: bool) -> Iterator[tuple[Lang, Passage, str]]:
    """Endlessly: the language to translate into, in turn, a passage of meanings not used before, and the question."""
    seen: set[Any] = set()
    for target, source in itertools.cycle(DIRECTIONS):
        keys: set[Any] = set()
        while not keys or keys & seen:
            passage = sample_passage(rng, accept=lambda s: held_out(s) == evaluation, level=4)
            terms: list[tuple[str, str]] = []
            if rng.random() < 0.5:
                passage, terms = with_terms(passage, rng, target, rng.choice([1, 1, 2]), level=4)
            keys = {s.key for s in passage.sentences}
        seen |= keys
        yield target, passage, prompt(render(passage, source, random_style(rng, 0.2)), target, terms)
