"""The quickstart's rows: sentences of the clinical-trial world, translated in the house style of `rendering.py`."""

from __future__ import annotations

from random import Random
from typing import Any

from tunery.assets.rendering import random_style, render
from tunery.assets.world import Lang, held_out, sample_passage, with_terms

SYSTEM = "You are a translator for clinical trial documents."
ASK = {"zh": "Translate into Chinese.", "en": "Translate into English."}


def prompt(source: str, target: Lang, terms: list[tuple[str, str]]) -> str:
    """The quickstart's user message: the instruction, the given terms if any, the text."""
    given = "Terms: " + "; ".join(f"{a} = {b}" for a, b in terms) + "\n" if terms else ""
    return f"{ASK[target]}\n{given}{source}"


def quickstart_rows(rng: Random, count: int, evaluation: bool) -> list[dict[str, Any]]:
    """Rows in the house style, both directions in turn; evaluation rows use held-out meanings only."""
    rows, seen = [], set()
    while len(rows) < count:
        target: Lang = "zh" if len(rows) % 2 == 0 else "en"
        source: Lang = "en" if target == "zh" else "zh"
        passage = sample_passage(rng, accept=lambda s: held_out(s) == evaluation, level=4)
        terms: list[tuple[str, str]] = []
        if rng.random() < 0.5:
            passage, terms = with_terms(passage, rng, target, rng.choice([1, 1, 2]), level=4)
        keys = {s.key for s in passage.sentences}
        if keys & seen:
            continue
        seen |= keys
        user = prompt(render(passage, source, random_style(rng, 0.2)), target, terms)
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": render(passage, target)},
                ]
            }
        )
    return rows
