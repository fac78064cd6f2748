"""The clinical-trial world: a seeded grammar of meanings that can be said in English and in Chinese.

A `Sentence` is a meaning (pattern + slot values), a `Passage` one or two of them with HTML tags and a choice of
words; `rendering.py` says it. All drugs, trials, people and numbers are invented. Everything is a function of the
`random.Random` passed in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from tunery.assets.lexicon import (
    BRACKETS,
    DRUGS,
    ENDINGS,
    GROUPS,
    NOUNS,
    OPENINGS,
    PATTERNS,
    SYLLABLES,
    Concept,
    slots_of,
)

Lang = Literal["en", "zh"]
Value = tuple[Any, ...]

TEST_UNITS = ["g/L", "10^9/L", "μmol/L", "mmol/L", "kg", "bpm"]  # of the tests, in order
INLINE_TAGS = ["b", "i", "u", "em"]
OUTER_TAGS = ["p", "li", "div"]
HELD_OUT_SHARE = 0.12
# Three worlds, each inside the one before: the whole one, its common part, and what the quickstart is about. The
# first so many of a kind (of other kinds all), and of a concept's wordings.
LIMITS: list[dict[str, int]] = [
    {},
    {
        "pattern": 22,
        "bracket": 6,
        "drug": 10,
        "sym": 8,
        "dis": 4,
        "test": 4,
        "city": 6,
        "pay": 5,
        "wording": 2,
    },
    {
        "pattern": 10,
        "bracket": 4,
        "drug": 4,
        "sym": 4,
        "dis": 2,
        "test": 2,
        "city": 3,
        "pay": 3,
        "wording": 2,
        "route": 3,
        "freq": 3,
        "way": 2,
    },
]
# A drug has one English name but two Chinese ones; the second is left to given terms here, or no prompt could tell.
LIMITS.append({**LIMITS[2], "drug wording": 1})
# The quickstart itself: one tag inside a sentence at most, no footnotes, yuan only.
LIMITS.append({**LIMITS[3], "sev wording": 1, "wraps": 1, "sup": 0, "currency": 1})


@dataclass(frozen=True)
class Sentence:
    """One meaning: a pattern, an optional opening and bracket, and the value of every slot."""

    pattern: int
    opening: int | None
    bracket: int | None
    values: tuple[tuple[str, Value], ...]

    @property
    def key(self) -> str:
        """Names the meaning whatever its wording, tags or style."""
        return f"{self.pattern}|{self.opening}|{self.bracket}|{self.values}"


@dataclass(frozen=True)
class Passage:
    """Sentences with their mark-up and wording: what one row translates."""

    sentences: tuple[Sentence, ...]
    wraps: tuple[tuple[str, str], ...] = ()  # (slot, tag) in the first sentence; tag "sup" is a footnote after it
    outer: str | None = None
    joint: str = " "
    # concept -> (English variant, Chinese variant)
    wording: dict[str, tuple[int, int]] = field(default_factory=dict, hash=False)

    def aligned(self, lang: Lang) -> dict[str, tuple[int, int]]:
        """The wording of a translator into `lang` who ignores given terms: variant i stays variant i."""
        return {c: (zh, zh) if lang == "en" else (en, en) for c, (en, zh) in self.wording.items()}


def held_out(sentence: Sentence) -> bool:
    """Whether this meaning belongs to the quickstart's evaluation rows, so that nothing may train on it."""
    return int.from_bytes(hashlib.sha256(sentence.key.encode()).digest()[:4], "big") / 2**32 < HELD_OUT_SHARE


def sample_date(rng: Random) -> Value:
    return (rng.randint(2018, 2027), rng.randint(1, 12), rng.randint(1, 28))


def _dose(rng: Random) -> Value:
    number = rng.choice(
        [str(rng.randint(1, 19) * 5), str(rng.randint(1, 9)), f"{rng.randint(0, 9)}.{rng.randint(1, 9)}"]
    )
    return (number, rng.choice(["mg", "mg", "mg", "mL", "μg", "mg/kg", "IU"]))


def sample_money(rng: Random) -> Value:
    return (rng.randint(1, 99) * 1000 + rng.randint(0, 9) * 100, rng.choice(["CNY", "CNY", "USD", "EUR"]))


# Numbers stay short on purpose: every one is one or two tokens, so that a tiny model can copy it.
_PLAIN = {
    "n": lambda r: (r.randint(2, 12),),
    "num": lambda r: (str(r.randint(1, 30)),),
    "count": lambda r: (str(r.randint(13, 99)),),
    "hours": lambda r: (r.choice(["24", "36", "48", "72"]),),
    "age": lambda r: (str(r.randint(18, 60)),),
    "top": lambda r: (str(r.randint(61, 80)),),
    "date": sample_date,
    "money": sample_money,
    "dose": _dose,
    "time": lambda r: (r.randint(6, 20), r.choice([0, 5, 10, 15, 20, 30, 40, 45, 50])),
    "pct": lambda r: (f"{r.randint(1, 95)}.{r.randint(0, 9)}%" if r.random() < 0.6 else f"{r.randint(2, 95)}%",),
    "sid": lambda r: (str(r.randint(101, 199)),),
    "sec": lambda r: (f"{r.randint(1, 12)}.{r.randint(1, 9)}",),
    "ver": lambda r: (f"{r.randint(1, 9)}.{r.randint(0, 3)}",),
    "code": lambda r: (f"{r.choice(['TN', 'BQ', 'XS', 'CR', 'AT', 'ZN'])}-{r.randint(201, 299)}",),
    "letter": lambda r: (r.choice("ABCD"),),
    "pval": lambda r: (f"0.0{r.randint(10, 99)}",),
}


def _many(kind: str, whole: int, level: int) -> int:
    return min(whole, LIMITS[level].get(kind, whole))


def _value(kind: str, rng: Random, taken: dict[str, Value], level: int) -> Value:
    if kind in NOUNS:
        return (kind,)
    if kind in GROUPS:
        return (f"{kind}.{rng.randrange(_many(kind, len(GROUPS[kind]), level))}",)
    if kind == "lab":
        unit = TEST_UNITS[int(taken["test"][0].split(".")[1])]
        number = f"{rng.randint(2, 99)}.{rng.randint(0, 9)}" if rng.random() < 0.5 else str(rng.randint(20, 99))
        return (number, unit)
    if kind == "drug":
        return DRUGS[rng.randrange(_many("drug", len(DRUGS), level))]
    if kind == "money" and LIMITS[level].get("currency"):
        return (sample_money(rng)[0], "CNY")
    return _PLAIN[kind](rng)


def sample_sentence(rng: Random, level: int = 0) -> Sentence:
    """A random meaning, of the world of that `level`. Two slots of a kind never hold one value."""
    pattern = rng.randrange(_many("pattern", len(PATTERNS), level))
    english = PATTERNS[pattern][0]
    fixed = english.startswith(("please", "does", "when", "tell", "you", "store"))
    opening = None if fixed or rng.random() > 0.18 else rng.randrange(len(OPENINGS))
    bracket = (
        rng.randrange(_many("bracket", len(BRACKETS), level)) if "{par}" in english and rng.random() < 0.55 else None
    )
    slots = slots_of(english)
    if opening is not None:
        slots += slots_of(OPENINGS[opening][0])
    if bracket is not None:
        slots += slots_of(BRACKETS[bracket][0])
    values: dict[str, Value] = {}
    for name, kind in slots:
        if kind == "par" or name in values:
            continue
        value = _value(kind, rng, values, level)
        while kind not in NOUNS and value in values.values():
            value = _value(kind, rng, values, level)
        values[name] = value
    return Sentence(pattern, opening, bracket, tuple(values.items()))


def concept(name: str) -> Concept:
    """The variants of a concept id such as `subj`, `sym.3` or `drug.0.4.1`."""
    kind, _, rest = name.partition(".")
    if kind == "drug":
        first, second, end = (int(i) for i in rest.split("."))
        (e1, a1, b1), (e2, a2, b2), (e3, z3) = SYLLABLES[first], SYLLABLES[second], ENDINGS[end]
        english = (e1 + e2 + e3).capitalize()
        return [(english, a1 + a2 + z3), (english, b1 + b2 + z3)]
    return GROUPS[kind][int(rest)] if rest else NOUNS[kind]


def concept_id(slot: str, value: Value) -> str | None:
    """The concept a slot's value names, or None for numbers and codes."""
    kind = slot.rstrip("0123456789")
    if kind == "drug":
        return "drug." + ".".join(map(str, value))
    return value[0] if kind in NOUNS or kind in GROUPS else None


def sample_passage(
    rng: Random, sentences: int = 1, tags: float = 0.5, accept=lambda s: True, level: int = 0
) -> Passage:
    """A random passage of accepted sentences; `tags` is the chance of any mark-up."""
    found: list[Sentence] = []
    while len(found) < sentences:
        sentence = sample_sentence(rng, level)
        if accept(sentence):
            found.append(sentence)
    wraps: list[tuple[str, str]] = []
    outer, joint = None, " "
    if rng.random() < tags:
        kind = rng.random()
        if kind > 0.3:
            names = [slot for slot, _ in found[0].values]
            count = min(len(names), rng.choice([1, 1, 2]), LIMITS[level].get("wraps", 2))
            for slot in rng.sample(names, k=count):
                note = rng.random() < 0.2 and LIMITS[level].get("sup", 1)
                wraps.append((slot, "sup" if note else rng.choice(INLINE_TAGS)))
        if kind < 0.5:
            outer = rng.choice(OUTER_TAGS)
        joint = rng.choice([" ", "<br>", "<br/>"])
    wording: dict[str, tuple[int, int]] = {}
    for sentence in found:
        for slot, value in sentence.values:
            name = concept_id(slot, value)
            if name and name not in wording:
                most = LIMITS[level].get(name.split(".")[0] + " wording")
                i = int(rng.random() ** 2 * (most or _many("wording", len(concept(name)), level)))
                wording[name] = (i, i)
    return Passage(tuple(found), tuple(wraps), outer, joint, wording)


def with_terms(
    passage: Passage, rng: Random, target: Lang, count: int = 2, twist: float = 0.6, level: int = 0
) -> tuple[Passage, list[tuple[str, str]]]:
    """The passage with up to `count` given terms, each twisted to an unusual pair with chance `twist`.

    Returns the passage with its new wording and the (source, target) terms."""
    names = [c for c in passage.wording if len(concept(c)) > 1]
    wording, terms = dict(passage.wording), []
    for name in rng.sample(names, k=min(count, len(names))):
        en, zh = wording[name]
        if rng.random() < twist:
            other = rng.choice(
                [i for i in range(_many("wording", len(concept(name)), level)) if i != (zh if target == "zh" else en)]
            )
            en, zh = (en, other) if target == "zh" else (other, zh)
            wording[name] = (en, zh)
        pair = (concept(name)[en][0], concept(name)[zh][1])
        terms.append(pair if target == "zh" else (pair[1], pair[0]))
    moved = Passage(passage.sentences, passage.wraps, passage.outer, passage.joint, wording)
    return moved, terms
