"""`tunery inspect`: what the model will see of the data, before it does. Needs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.text import Text

from tunery.data.store import TokenStore
from tunery.errors import ConfigError
from tunery.job import Job
from tunery.setup import read_data
from tunery.types import Tokens

TRAINED, SHOWN = "bold green", "dim"
BARS, WIDTH = 12, 48


def inspect(job: Job, console: Any, rows: int = 2, seed: int = 0) -> None:
    """Print, for `rows` examples drawn by `seed`, each sequence as tokens (trained ones green, others dim, partly
    weighted ones yellow), its exact text and its trained text; then the lengths of all as a histogram."""
    read = read_data(job, console)
    tokenizer, template, data = read.tokenizer, read.template, read.data
    data.report.print(console)
    if not isinstance(data.train, TokenStore):
        raise ConfigError("data.streaming: inspect looks at data in memory; set it to false (and samples, if need be)")
    store = data.train
    chosen = np.random.default_rng(seed).choice(len(store), size=min(rows, len(store)), replace=False)
    for number in chosen:
        file, row = store.origin(int(number))
        for part, tokens in enumerate(store.sequences(int(number)), start=1):
            console.print()
            of = f", sequence {part}" if len(store.sequence_lengths(int(number))) > 1 else ""
            cut = ", cut to fit" if tokens.extra.get("truncated") else ""
            console.rule(f"{file}:{row}{of}: {len(tokens)} tokens, {tokens.labelled} trained{cut}", align="left")
            console.print(coloured(tokens, tokenizer))
            console.print(Text("text:    ", "bold") + Text(repr(tokenizer.decode(tokens.ids))), highlight=False)
            for text in trained_texts(tokens, tokenizer):
                console.print(Text("trained: ", "bold") + Text(repr(text), TRAINED), highlight=False)
    console.print()
    source = template.source or "(plain text, no chat template)"
    about = Text(f"template {template.name}: {len(source)} characters; answers end with ")
    console.print(about + ends(template, tokenizer))
    console.print(Text("tokens per example", "bold"))
    for line in histogram(store.lengths):
        console.print(line, highlight=False)


def ends(template: Any, tokenizer: Any) -> Text:
    """The tokens at which generation stops, as text."""
    return Text(" or ".join(repr(tokenizer.decode([i])) for i in template.end_ids))


def coloured(tokens: Tokens, tokenizer: Any) -> Text:
    """One sequence, token by token; a thin bar between tokens. Tokens that are part of one character (emoji in bytes)
    are shown together, in the colour of the last."""
    text = Text()
    weights = tokens.weights.copy()
    weights[0] = 0.0  # the first token is predicted from nothing
    for ids, end in whole_characters(tokens.ids, tokenizer):
        weight = weights[end - 1]
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
