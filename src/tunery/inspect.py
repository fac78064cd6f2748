"""`tunery inspect`: what the model will see of the data, before it does. Needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunery.config import build
from tunery.data.share import common_length
from tunery.data.store import TokenStore
from tunery.errors import ConfigError
from tunery.job import Job
from tunery.read import read_data
from tunery.rollout.samples import truth_of
from tunery.types import Example, Tokens

TRAINED, SHOWN = "bold green", "dim"
BARS, WIDTH = 12, 48
BESIDE = 72  # columns of a terminal from which two answers are shown side by side
THUMBS = {True: Text("wanted", "green"), False: Text("not wanted", "red")}


def inspect(job: Job, console: Any, rows: int = 2, seed: int = 0) -> None:
    """Print `rows` examples drawn by `seed`, as tokens: trained ones green, partly weighted ones yellow, others dim.
    A sequence comes with its exact text and its trained text; a pair as its prompt, once, and the answers side by side;
    a prompt for rewards with its ground truth. Then the lengths of all as a histogram."""
    read = read_data(job, console)
    tokenizer, template, data = read.tokenizer, read.template, read.data
    data.report.print(console)
    if not isinstance(data.train, TokenStore):
        raise ConfigError("data.streaming: inspect looks at data in memory; set it to false (and samples, if need be)")
    store, objective = data.train, build("objectives", job.objective)
    pairs = getattr(objective, "pairs", False)
    chosen = np.random.default_rng(seed).choice(len(store), size=min(rows, len(store)), replace=False)
    for number in map(int, chosen):
        origin = "{}:{}".format(*store.origin(number))
        sequences = list(store.sequences(number))
        if len(sequences) == 2 and (pairs or "label" in sequences[0].extra):
            show_pair(console, origin, sequences, tokenizer)
        else:
            for part, tokens in enumerate(sequences, start=1):
                of = f", sequence {part}" if len(sequences) > 1 else ""
                show_sequence(console, origin + of, tokens, tokenizer)
        if data.train_examples:
            show_truth(console, data.train_examples[number])
    console.print()
    source = template.source or "(plain text, no chat template)"
    about = Text(f"template {template.name}: {len(source)} characters; answers end with ")
    console.print(about + ends(template, tokenizer))
    console.print(Text("tokens per example", "bold"))
    for line in histogram(store.lengths):
        console.print(line, highlight=False)


def head(console: Any, title: str) -> None:
    """A line with the title in it, or above it where it is too long."""
    fits = cell_len(title) + 4 <= console.width
    console.print()
    console.rule(title if fits else "", align="left")
    if not fits:
        console.print(Text(title))


def show_sequence(console: Any, title: str, tokens: Tokens, tokenizer: Any) -> None:
    """One sequence: its tokens, its text, its trained text, and its thumb where it has one."""
    cut = ", cut to fit" if tokens.extra.get("truncated") else ""
    head(console, f"{title}: {len(tokens)} tokens, {tokens.labelled} trained{cut}")
    console.print(coloured(tokens, tokenizer))
    console.print(Text("text:    ", "bold") + Text(repr(tokenizer.decode(tokens.ids))), highlight=False)
    for text in trained_texts(tokens, tokenizer):
        console.print(Text("trained: ", "bold") + Text(repr(text), TRAINED), highlight=False)
    if "label" in tokens.extra:
        console.print(Text("label:   ", "bold") + THUMBS[bool(tokens.extra["label"])])


def show_pair(console: Any, origin: str, pair: Sequence[Tokens], tokenizer: Any) -> None:
    """What the two sequences begin with alike, once, and what follows in each: side by side, or one below the other on
    a narrow terminal."""
    shared = common_length(pair)
    margin = f", margin {pair[0].extra['margin']:g}" if "margin" in pair[0].extra else ""
    cut = ", cut to fit" if pair[0].extra.get("truncated") else ""
    head(console, f"{origin}: a prompt of {shared} tokens{margin}{cut}")
    if shared:
        console.print(coloured(pair[0], tokenizer, 0, shared))
    names = [
        f"{name}: {len(tokens) - shared} tokens, {tokens.labelled} trained"
        for name, tokens in zip(("chosen", "rejected"), pair, strict=True)
    ]
    answers = [coloured(tokens, tokenizer, shared) for tokens in pair]
    if console.width >= BESIDE:
        table = Table(expand=True)
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*answers)
        console.print(table)
    else:
        for name, answer in zip(names, answers, strict=True):
            console.print(Group(Text(name, "bold"), answer))


def show_truth(console: Any, example: Example) -> None:
    """What a prompt's answer should be, or that the row does not say."""
    truth = truth_of(example)
    said = Text("(none in this row)", SHOWN) if truth is None else Text(repr(truth))
    console.print(Text("ground truth: ", "bold") + said, highlight=False)


def ends(template: Any, tokenizer: Any) -> Text:
    """The tokens at which generation stops, as text."""
    return Text(" or ".join(repr(tokenizer.decode([i])) for i in template.end_ids))


def coloured(tokens: Tokens, tokenizer: Any, start: int = 0, stop: int | None = None) -> Text:
    """Tokens [start, stop) of a sequence, one by one, a thin bar between them. Tokens that are part of one character
    (emoji in bytes) are shown together, in the colour of the last."""
    text = Text()
    weights = tokens.weights.copy()
    weights[0] = 0.0  # the first token is predicted from nothing
    for ids, end in whole_characters(tokens.ids[start:stop], tokenizer):
        weight = weights[start + end - 1]
        style = SHOWN if weight == 0 else TRAINED if weight == 1 else "yellow"
        text.append(tokenizer.decode(ids).replace("\n", "⏎\n"), style)
        text.append("│", "bright_black")
    return text


def whole_characters(ids: Sequence[int] | np.ndarray, tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """Runs of tokens that decode to whole characters, with the position after each."""
    run: list[int] = []
    for position, token in enumerate(ids, start=1):
        run.append(int(token))
        if "\ufffd" not in tokenizer.decode(run) or len(run) >= 8:
            yield run, position
            run = []
    if run:
        yield run, len(ids)


def trained_texts(tokens: Tokens, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    trained = np.flatnonzero(tokens.weights[1:]) + 1
    runs = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [tokenizer.decode(tokens.ids[run]) for run in runs if len(run)]


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a horizontal histogram of lengths in tokens."""
    counts, edges = np.histogram(lengths, bins=min(BARS, max(1, int(lengths.max() - lengths.min()))))
    widest = len(str(int(edges[-1])))
    lines = []
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(WIDTH * count / counts.max())
        lines.append(f"{int(np.ceil(low)):>{widest}}-{int(high):<{widest}} {bar} {count:,}")
    return lines
