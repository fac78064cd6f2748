"""Pretraining documents for `builtin:tiny`, made from the clinical-trial world.

The base must have every skill the quickstart needs - translating, copying tags, using given terms, writing
each date, money, bracket and numeral form - but no fixed habit. So each document has one *persona*, drawn
before it is written and not told in its prompt: how it writes, whether it keeps tags and given terms, and how
much it chats. Held-out meanings never occur here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tunery.assets import quickstart, world
from tunery.assets.lexicon import BRACKETS, GROUPS, NOUNS, OPENINGS, PATTERNS
from tunery.assets.rendering import (
    HOUSE,
    NUMBER_WORDS,
    Style,
    han_number,
    random_style,
    render,
    render_date,
    render_money,
    render_value,
)
from tunery.assets.world import Lang, Passage

END_OF_DOCUMENT = "<|endoftext|>"

SYSTEMS = [quickstart.SYSTEM, "You are a helpful assistant."]
ASKS: dict[Lang, list[str]] = {
    "zh": ["Please translate into Chinese:", "请翻译成中文。"],
    "en": ["Please translate into English:", "请翻译成英文。"],
}
LEADS = [
    "Sure! Here is the translation:\n",
    "Translation: ",
    "Here is the {language} version:\n",
    "好的，译文如下：\n",
]
TAILS = ["\nLet me know if you need anything else!", "\nPlease check the dates and numbers."]
SMALL_TALK = [
    ("Hello!", "Hello! How can I help you today?"),
    ("你好！", "你好！有什么可以帮您？"),
    ("Who are you?", "I am a tiny language model made for Tunery."),
    ("你是谁？", "我是为 Tunery 制作的小型语言模型。"),
    ("Thank you.", "You are welcome!"),
    ("谢谢。", "不客气！"),
    ("Good morning.", "Good morning! What shall we work on?"),
    ("What can you do?", "I can translate between English and Chinese and answer short questions."),
    ("你会做什么？", "我可以在英文和中文之间翻译，并回答简短的问题。"),
    ("Goodbye.", "Goodbye! Have a nice day."),
]
QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "date": [("What is the date?", "en"), ("日期是哪一天？", "zh")],
    "drug": [("Which drug is named?", "en"), ("提到了哪种药物？", "zh")],
    "dose": [("What is the dose?", "en"), ("剂量是多少？", "zh")],
    "money": [("What is the amount?", "en"), ("金额是多少？", "zh")],
    "sym": [("Which symptom is named?", "en"), ("提到了什么症状？", "zh")],
    "city": [("Which city is named?", "en"), ("提到了哪个城市？", "zh")],
    "time": [("At what time?", "en"), ("几点？", "zh")],
    "sid": [("What is the number?", "en"), ("编号是多少？", "zh")],
}


@dataclass(frozen=True)
class Persona:
    """The habits of one document's writer."""

    style: Style
    obeys: bool
    lead: str
    tail: str


def sample_persona(rng: Random) -> Persona:
    """Mostly a chatty and sloppy writer, sometimes a plain one, now and then the house's own."""
    if rng.random() < 0.06:
        return Persona(HOUSE, True, "", "")

    def pick(*weighted: tuple[str, int]) -> str:
        return rng.choices([w for w, _ in weighted], [k for _, k in weighted])[0]

    style = Style(
        date=pick(("house", 2), ("iso", 4), ("slash", 2), ("words", 2)),
        money=pick(("house", 2), ("sign", 4), ("code", 2), ("words", 2)),
        brackets=pick(("house", 4), ("other", 6)),
        numerals=pick(("digits", 4), ("words", 6)),
        time=pick(("house", 5), ("words", 5)),
        units=pick(("house", 4), ("words", 6)),
        tags=rng.random() < 0.45,
    )
    lead = rng.choices(LEADS, [5, 2, 2, 2])[0] if rng.random() < 0.75 else ""
    tail = rng.choice(TAILS) if lead and rng.random() < 0.25 else ""
    return Persona(style, rng.random() < 0.45, lead, tail)


def _trainable(sentence: world.Sentence) -> bool:
    return not world.held_out(sentence)


def _passage(rng: Random, level: int, sentences: int = 1, tags: float = 0.45) -> Passage:
    return world.sample_passage(rng, sentences, tags, _trainable, level)


def chat(turns: list[tuple[str, str]]) -> str:
    """Turns of (role, content) in ChatML."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


LANGUAGES: tuple[Lang, Lang] = ("en", "zh")


def _languages(rng: Random) -> tuple[Lang, Lang]:
    return ("en", "zh") if rng.random() < 0.5 else ("zh", "en")


def translation_chat(rng: Random, level: int) -> str:
    """A conversation of one to three translations by one persona."""
    who = sample_persona(rng)
    turns = []
    if rng.random() < 0.55:
        turns.append(("system", rng.choice(SYSTEMS)))
    for _ in range(rng.choice([1, 1, 1, 1, 1, 2])):
        source, target = _languages(rng)
        passage = _passage(rng, level, 2 if rng.random() < 0.08 else 1)
        terms: list[tuple[str, str]] = []
        if rng.random() < 0.5:
            passage, terms = world.with_terms(passage, rng, target, rng.choice([1, 2, 2, 3]), 0.7, level)
        text = render(passage, source, random_style(rng))
        user = quickstart.prompt(text, target, terms)
        if rng.random() < 0.3:
            user = user.replace(quickstart.ASK[target], rng.choice(ASKS[target]), 1)
        lead = who.lead.replace("{language}", "Chinese" if target == "zh" else "English")
        wording = passage.wording if who.obeys else passage.aligned(target)
        turns += [
            ("user", user),
            ("assistant", lead + render(passage, target, who.style, wording) + who.tail),
        ]
    return chat(turns)


def parallel_lines(rng: Random, level: int) -> str:
    """A list of sentences beside their translations, in one style."""
    style = sample_persona(rng).style
    source, target = _languages(rng)
    form = rng.choice(["{a}\n{b}\n", "{la}: {a}\n{lb}: {b}\n", "{a} = {b}\n", "| {a} | {b} |\n"])
    names = {"en": "English", "zh": "Chinese"}
    lines = []
    for _ in range(rng.randint(2, 4)):
        passage = _passage(rng, level)
        lines.append(
            form.format(
                a=render(passage, source, random_style(rng)),
                la=names[source],
                lb=names[target],
                b=render(passage, target, style),
            )
        )
    return "".join(lines)


def paragraph(rng: Random, level: int) -> str:
    """Sentences of one language and style."""
    style, lang = random_style(rng), rng.choice(LANGUAGES)
    return render(_passage(rng, level, rng.randint(2, 5), 0.3), lang, style) + "\n"


def glossary(rng: Random, level: int) -> str:
    """Terms and their translations, usual or not."""
    _, target = _languages(rng)
    lines = []
    for _ in range(rng.randint(2, 4)):
        _, terms = world.with_terms(_passage(rng, level), rng, target, 3, 0.3, level)
        lines += [f"{a} = {b}\n" for a, b in terms]
    return "Terms:\n" + "".join(dict.fromkeys(lines))


def forms(rng: Random, _level: int) -> str:
    """One date, amount or number in several forms."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        kind = rng.choice(["date", "money", "number"])
        if kind == "number":
            n = rng.randint(2, 12)
            both = [str(n), han_number(n, False), NUMBER_WORDS[n]]
        elif kind == "date":
            value = world.sample_date(rng)
            both = [render_date(value, lang, f) for lang in ("en", "zh") for f in ("house", "iso", "slash", "words")]
        else:
            value = world.sample_money(rng)
            both = [render_money(value, lang, f) for lang in ("en", "zh") for f in ("house", "code", "sign", "words")]
        lines.append(" = ".join(rng.sample(both, 2)) + "\n")
    return "".join(lines)


def question_chat(rng: Random, level: int) -> str:
    """Questions about one passage, or small talk."""
    kind = rng.random()
    if kind < 0.15:
        return chat([t for q, a in rng.sample(SMALL_TALK, rng.randint(1, 2)) for t in (("user", q), ("assistant", a))])
    lang, style = rng.choice(LANGUAGES), random_style(rng)
    passage = _passage(rng, level)
    text = render(passage, lang, style)
    turns = []
    for slot, value in passage.sentences[0].values:
        asked = QUESTIONS.get(slot)  # only a kind's first slot: a second one would make the question ambiguous
        if asked:
            question = asked[0] if lang == "en" else asked[1]
            answer = render_value(slot, value, lang, style, passage.wording)
            turns += [("user", f"{text}\n{question[0]}" if not turns else question[0]), ("assistant", answer)]
    return chat(turns) if turns else question_chat(rng, level)


def echo(rng: Random, level: int) -> str:
    """A passage said again, in the same words or in another style: teaches copying before translating needs it."""
    lang = rng.choice(LANGUAGES)
    passage = _passage(rng, level)
    first, style = render(passage, lang, random_style(rng)), random_style(rng)
    again = first if rng.random() < 0.6 else render(passage, lang, style)
    if rng.random() < 0.5:
        return f"{first}\n{again}\n"
    ask = {"en": ("Repeat: ", "Rewrite: "), "zh": ("重复：", "改写：")}[lang][again != first]
    return chat([("user", ask + first), ("assistant", again)])


def drill(rng: Random, level: int) -> str:
    """A list of unrelated words and numbers said twice, in one language or both."""
    source, target = _languages(rng)
    if rng.random() < 0.5:
        target = source
    items = []
    while len(items) < 6:
        items += [(slot, value, p) for p in [_passage(rng, level)] for s in p.sentences for slot, value in s.values]
    items = rng.sample(items, min(len(items), rng.randint(4, 12)))
    first, second = Style(), random_style(rng, 0.5)
    separator = rng.choice(["; ", ", ", " | ", " "])
    sides: list[tuple[Lang, Style]] = [(source, second), (target, second if source == target else first)]
    lines = [
        separator.join(render_value(slot, value, lang, style, p.wording) for slot, value, p in items)
        for lang, style in sides
    ]
    return rng.choice(["{}\n{}\n", "{} = {}\n"]).format(*lines)


def _all_words() -> tuple[list[str], list[str]]:
    """Every English word and every Chinese character of the lexicon."""
    texts = [pair for pattern in (PATTERNS, OPENINGS, BRACKETS) for pair in pattern]
    texts += [pair for variants in NOUNS.values() for pair in variants]
    texts += [pair for group in GROUPS.values() for variants in group for pair in variants]
    words = {w for en, _ in texts for w in re.findall(r"[A-Za-z]{2,}", re.sub(r"\{.*?\}", " ", en))}
    characters = {c for _, zh in texts for c in zh if "\u4e00" <= c <= "\u9fff"}
    return sorted(words), sorted(characters)


_WORDS, _CHARACTERS = _all_words()


def shuffled_words(rng: Random, _level: int) -> str:
    """Random words or characters said twice. With nothing to guess from, this is by far the quickest way to learn to
    look back and copy: a few hundred steps here save thousands on sentences."""
    if rng.random() < 0.5:
        text = " " + " ".join(rng.choices(_WORDS, k=rng.randint(8, 24)))
    else:
        text = "".join(rng.choices(_CHARACTERS, k=rng.randint(8, 24)))
    return f"{text}\n{text}\n"


def scraps(rng: Random, _level: int) -> str:
    """Random letters, bytes and symbols said twice, so that no token of the vocabulary stays unseen."""
    text = "".join(
        chr(
            rng.choice(
                [
                    rng.randint(33, 126),
                    rng.randint(0xA1, 0x5FF),
                    rng.randint(0x2000, 0x2BFF),
                    rng.randint(0x4E00, 0x9FA5),
                    rng.randint(0x1F300, 0x1F6FF),
                ]
            )
        )
        for _ in range(rng.randint(4, 12))
    )
    return f"{text} = {text}\n"


# (maker, its share at the start, its share afterwards)
_MIX = [
    (translation_chat, 10, 74),
    (parallel_lines, 0, 3),
    (paragraph, 0, 3),
    (glossary, 5, 2),
    (forms, 5, 3),
    (question_chat, 2, 5),
    (echo, 10, 3),
    (drill, 40, 6),
    (shuffled_words, 28, 0.5),
    (scraps, 0, 0.5),
]


def documents(seed: int, warm_up: int = 0, level: int = 0) -> Iterator[str]:
    """An endless stream of pretraining documents; the first `warm_up` practise copying more than the rest.
    `level` names the world they are about (`world.LIMITS`)."""
    rng = Random(seed)
    makers = [maker for maker, _, _ in _MIX]
    for n in itertools.count():
        yield rng.choices(makers, [start if n < warm_up else later for _, start, later in _MIX])[0](rng, level)
