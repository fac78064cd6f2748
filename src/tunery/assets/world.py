"""The clinical-trial world: a seeded grammar that says one meaning in English and in Chinese, in any style.

A `Sentence` is a meaning (pattern + slot values), a `Passage` one or two of them with HTML tags and a choice
of wording. `render` writes a passage in a language and a `Style`; the *house* style is what the quickstart
teaches:

- only the translation, nothing before or after it;
- every HTML tag kept, around the same words;
- Chinese: full-width brackets, dates as 2024年3月5日, money as 12,500元, 12,500美元 or 12,500欧元;
- English: half-width brackets after a space, dates as 05 Mar 2024, money as CNY, USD or EUR 12,500;
- both: numbers in half-width Arabic digits (never 三 or three), times as 08:30, units as symbols (10 mg);
- given terms ("Terms: subject = 患者") obeyed, the usual translation elsewhere.

All drugs, trials, people and numbers are invented. Everything is a function of the `random.Random` passed in.
"""

from __future__ import annotations

import hashlib
import re
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
)

Lang = Literal["en", "zh"]
Value = tuple[Any, ...]

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
HAN_DIGITS = "零一二三四五六七八九"
DOSE_UNITS = {"mg": "毫克", "mL": "毫升", "μg": "微克", "mg/kg": "毫克/公斤", "IU": "国际单位"}
CURRENCIES = {
    "CNY": ("RMB", "¥", "yuan", "元"),
    "USD": ("US$", "$", "dollars", "美元"),
    "EUR": ("Euro", "€", "euros", "欧元"),
}
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
class Style:
    """How a text is written; the defaults are the house style. `tags=False` drops the tags."""

    date: str = "house"  # house | iso | slash | words
    money: str = "house"  # house | code | sign | words
    brackets: str = "house"  # house | other (half-width in Chinese, full-width in English)
    numerals: str = "digits"  # digits | words
    time: str = "house"  # house | words
    units: str = "house"  # house | words (毫克) in Chinese, tight (10mg) in English
    tags: bool = True


HOUSE = Style()


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


# --- slots -------------------------------------------------------------------------------------------------

_SLOT = re.compile(r"\{(a )?([a-z]+)(\d?)(\+s)?\}")


def _slots(pattern: str) -> list[tuple[str, str]]:
    return [(m[2] + m[3], m[2]) for m in _SLOT.finditer(pattern)]


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
    slots = _slots(english)
    if opening is not None:
        slots += _slots(OPENINGS[opening][0])
    if bracket is not None:
        slots += _slots(BRACKETS[bracket][0])
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


# --- rendering ---------------------------------------------------------------------------------------------


def han_number(n: int, counting: bool = True) -> str:
    """0 <= n < 100 in Chinese words; `counting` makes a lone two 两, as before a measure word."""
    if n == 2 and counting:
        return "两"
    if n < 10:
        return HAN_DIGITS[n]
    if n < 20:
        return "十" + (HAN_DIGITS[n - 10] if n > 10 else "")
    return HAN_DIGITS[n // 10] + "十" + (HAN_DIGITS[n % 10] if n % 10 else "")


def render_date(value: Value, lang: Lang, form: str) -> str:
    """A date; every form but `iso` and `slash` belongs to one language."""
    y, m, d = value
    if form == "iso":
        return f"{y}-{m:02d}-{d:02d}"
    if form == "slash":
        return f"{y}/{m}/{d}"
    if lang == "zh":
        return f"{y}年{m}月{d}日" if form == "house" else f"{y}年{han_number(m, False)}月{han_number(d, False)}日"
    return f"{d:02d} {MONTHS[m - 1][:3]} {y}" if form == "house" else f"{MONTHS[m - 1]} {d}, {y}"


def render_money(value: Value, lang: Lang, form: str) -> str:
    """An amount with its currency."""
    amount, code = value
    other, sign, word, han = CURRENCIES[code]
    if form == "sign":
        return f"{sign}{amount:,}"
    if form == "code":
        return f"{other} {amount:,}" if lang == "en" else f"{code} {amount:,}"
    if lang == "zh":
        return f"{amount:,}{han}" if form == "house" else f"{han}{amount:,}"
    return f"{code} {amount:,}" if form == "house" else f"{amount:,} {word}"


def _render_time(value: Value, lang: Lang, form: str) -> str:
    hour, minute = value
    if form == "house":
        return f"{hour:02d}:{minute:02d}"
    twelve = hour if hour <= 12 else hour - 12
    if lang == "en":
        return f"{twelve}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    return f"{'上午' if hour < 12 else '下午'}{twelve}点{f'{minute}分' if minute else ''}"


def render_value(slot: str, value: Value, lang: Lang, style: Style, wording: dict[str, tuple[int, int]]) -> str:
    kind = slot.rstrip("0123456789")
    name = concept_id(slot, value)
    if name:
        side = 0 if lang == "en" else 1
        return concept(name)[wording[name][side]][side]
    if kind == "date":
        return render_date(value, lang, style.date)
    if kind == "money":
        return render_money(value, lang, style.money)
    if kind == "time":
        return _render_time(value, lang, style.time)
    if kind in ("dose", "lab"):
        number, unit = value
        if style.units == "house" or (lang == "zh" and unit not in DOSE_UNITS):
            return f"{number} {unit}"
        return f"{number}{DOSE_UNITS[unit]}" if lang == "zh" else f"{number}{unit}"
    if kind == "n":
        n = value[0]
        if style.numerals == "digits":
            return str(n)
        return NUMBER_WORDS[n] if lang == "en" else han_number(n)
    return value[0]


def _plural(word: str) -> str:
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def render_sentence(
    sentence: Sentence,
    lang: Lang,
    style: Style,
    wording: dict[str, tuple[int, int]],
    wraps: tuple[tuple[str, str], ...] = (),
) -> str:
    """One sentence in one language; `wraps` marks up its slots."""
    side = 0 if lang == "en" else 1
    values = dict(sentence.values)
    tags = dict(wraps) if style.tags else {}
    notes = {slot: str(i) for i, slot in enumerate((s for s, t in wraps if t == "sup"), start=1)}

    def fill(match: re.Match[str]) -> str:
        article, slot, plural = match[1], match[2] + match[3], match[4]
        if slot == "par":
            if sentence.bracket is None:
                return ""
            inner = _SLOT.sub(fill, BRACKETS[sentence.bracket][side])
            if lang == "zh":
                return f"（{inner}）" if style.brackets == "house" else f"({inner})"
            return f" ({inner})" if style.brackets == "house" else f"（{inner}）"
        text = render_value(slot, values[slot], lang, style, wording)
        if plural:
            text = _plural(text)
        lead = f"{'an' if text[0] in 'aeiou' else 'a'} " if article else ""
        tag = tags.get(slot)
        if tag == "sup":
            text = f"{text}<sup>{notes[slot]}</sup>"
        elif tag:
            text = f"<{tag}>{text}</{tag.split()[0]}>"
        return lead + text

    text = _SLOT.sub(fill, PATTERNS[sentence.pattern][side])
    if sentence.opening is not None:
        text = _SLOT.sub(fill, OPENINGS[sentence.opening][side]) + text
    return _capitalise(text) if lang == "en" else text


def _capitalise(text: str) -> str:
    """Raises the first letter of the text, looking past opening tags."""
    match = re.match(r"(?:<[^>]*>)*", text)
    at = match.end() if match else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


def render(
    passage: Passage, lang: Lang, style: Style = HOUSE, wording: dict[str, tuple[int, int]] | None = None
) -> str:
    """The whole passage in one language and style; `wording` overrides the passage's own."""
    words = passage.wording if wording is None else wording
    parts = [
        render_sentence(s, lang, style, words, passage.wraps if i == 0 else ()) for i, s in enumerate(passage.sentences)
    ]
    joint = passage.joint if style.tags else " "
    text = ("" if lang == "zh" and joint == " " else joint).join(parts)
    if passage.outer and style.tags:
        text = f"<{passage.outer}>{text}</{passage.outer.split()[0]}>"
    return text


# --- prompts -----------------------------------------------------------------------------------------------

SYSTEM = "You are a translator for clinical trial documents."
ASK = {"zh": "Translate into Chinese.", "en": "Translate into English."}


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


def prompt(source: str, target: Lang, terms: list[tuple[str, str]]) -> str:
    """The quickstart's user message: the instruction, the given terms if any, the text."""
    given = "Terms: " + "; ".join(f"{a} = {b}" for a, b in terms) + "\n" if terms else ""
    return f"{ASK[target]}\n{given}{source}"


def random_style(rng: Random, house: float = 0.0) -> Style:
    """A style of independent habits, each the house habit with at least chance `house`."""

    def pick(usual: str, *others: str) -> str:
        return usual if rng.random() < house else rng.choice((usual, *others))

    return Style(
        pick("house", "iso", "slash", "words"),
        pick("house", "code", "sign", "words"),
        pick("house", "other"),
        pick("digits", "words"),
        pick("house", "words"),
        pick("house", "words"),
    )


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
