"""How the clinical-trial world is said: a passage in English or in Chinese, in any style.

`render` writes a passage in a language and a `Style`; the *house* style is what the quickstart teaches:

- only the translation, nothing before or after it;
- every HTML tag kept, around the same words;
- Chinese: full-width brackets, dates as 2024年3月5日, money as 12,500元, 12,500美元 or 12,500欧元;
- English: half-width brackets after a space, dates as 05 Mar 2024, money as CNY, USD or EUR 12,500;
- both: numbers in half-width Arabic digits (never 三 or three), times as 08:30, units as symbols (10 mg);
- given terms ("Terms: subject = 患者") obeyed, the usual translation elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tunery.assets.lexicon import BRACKETS, OPENINGS, PATTERNS, SLOT
from tunery.assets.world import Lang, Passage, Sentence, Value, concept, concept_id

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
            inner = SLOT.sub(fill, BRACKETS[sentence.bracket][side])
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

    text = SLOT.sub(fill, PATTERNS[sentence.pattern][side])
    if sentence.opening is not None:
        text = SLOT.sub(fill, OPENINGS[sentence.opening][side]) + text
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
