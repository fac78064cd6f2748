"""`tunery check`: the report of the data without training, and what a person should look at before trusting it."""

from __future__ import annotations

import re
import time
from collections.abc import Hashable
from typing import Any

import numpy as np

from tunery.data.dataset import DataConfig, Prepared, prepare
from tunery.data.examples import identity, read_examples, whole_identity
from tunery.data.report import DataReport, Finding, SourceReport
from tunery.data.store import TokenStore
from tunery.data.stream import StreamingExamples
from tunery.types import Example

# Text that chat templates write and people do not: a row that holds it was most likely rendered once already.
_MARKERS = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:start_header_id|end_header_id|eot_id|begin_of_text|endoftext|end_of_text)\|>"
    r"|<\|(?:system|user|assistant|end)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|### (?:Instruction|Response):"
)
_PLACEHOLDER = re.compile(r"\{\{ ?\w+ ?\}\}")
_LONG = 0.9  # an answer of this share of data.max_length


def check(config: DataConfig, template: Any, objective: Any, *, seed: int = 0, console: Any = None) -> DataReport:
    """What `prepare` reports, with warnings: exact duplicates, one prompt with different answers, prompts that eval
    shares with train, empty system messages, template markers and unfilled placeholders in the text, answers almost as
    long as data.max_length. A stream is read to its end. Raises ConfigError and DataError as `prepare` does."""
    started = time.perf_counter()
    prepared = prepare(config, template, objective, seed=seed, console=console)
    report = prepared.report
    if isinstance(prepared.train, StreamingExamples):
        eval_sources = report.sources[len(prepared.located) :]
        for _ in prepared.train.examples(0, 0):
            pass
        report.sources = prepared.train.report.sources + eval_sources
        report.refused = prepared.train.report.refused + [
            row for row in report.refused if row.source >= len(prepared.located)
        ]
        report.seconds = time.perf_counter() - started
    else:
        report.warnings += _long_answers(prepared.train, config.max_length)
    report.warnings += _warnings(prepared)
    return report


def _long_answers(store: TokenStore, max_length: int) -> list[str]:
    found = Finding()
    answered = store.labelled < store.lengths - 1  # else every token is trained: plain text, which has no answer
    for number in np.flatnonzero(answered & (store.labelled >= _LONG * max_length)).tolist():
        if len(store.sequence_lengths(number)) == 1:
            found.add(_place(*store.origin(number)))
    if not found.count:
        return []
    return [f"answers that fill {_LONG:.0%} of data.max_length ({max_length}) or more: {found}"]


def _place(file: str, row: int) -> str:
    return f"{file}:{row}"


def _warnings(prepared: Prepared) -> list[str]:
    """Sentences about the text of the training rows."""
    streaming = isinstance(prepared.train, StreamingExamples)
    held = {identity(example) for example in prepared.eval_examples}
    scan = Scan()
    for source in prepared.located:
        for file, row, example in read_examples(source, SourceReport(source.key, source.name), streaming):
            if isinstance(example, Example) and identity(example) not in held:
                scan.look(example, _place(file, row))
    shared = Finding()
    for example in prepared.eval_examples:
        prompt = _prompt(example)
        if prompt is not None and hash(prompt) in scan.answers:
            shared.add(_place(example.meta["file"], example.meta["row"]))
    return scan.sentences(shared)


class Scan:
    """One pass over the rows. It keeps hashes, not text, so that a data set larger than memory can be looked at."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.answers: dict[int, int] = {}  # hash of a prompt -> hash of its first answer
        self.duplicates = Finding()
        self.conflicts = Finding()
        self.empty_system = Finding()
        self.placeholders = Finding()
        self.markers: dict[str, Finding] = {}

    def look(self, example: Example, where: str) -> None:
        same = hash(whole_identity(example))
        if same in self.seen:
            self.duplicates.add(where)
        self.seen.add(same)
        prompt = _prompt(example)
        if prompt is not None and example.label is None:
            answer = hash(identity(example))
            if self.answers.setdefault(hash(prompt), answer) != answer:
                self.conflicts.add(where)
        if any(message.role == "system" and not message.content.strip() for message in example.messages):
            self.empty_system.add(where)
        texts = [message.content for message in example.messages] if example.text is None else []
        for marker in {found for text in texts for found in _MARKERS.findall(text)}:
            self.markers.setdefault(marker, Finding()).add(where)
        if any(_PLACEHOLDER.search(text) for text in texts):
            self.placeholders.add(where)

    def sentences(self, shared: Finding) -> list[str]:
        """What was found; `shared` are the evaluation rows whose prompt is in train."""
        markers = [
            (f"rows whose text holds {marker}, as if rendered by a template before", found)
            for marker, found in sorted(self.markers.items())
        ]
        found = [
            ("exact copies of earlier rows, which count more often than others", self.duplicates),
            ("rows that answer the prompt of an earlier row differently", self.conflicts),
            ("evaluation rows whose prompt is in the training data, with another answer", shared),
            ("rows with an empty system message", self.empty_system),
            ("rows with a placeholder such as {{name}} that nobody filled in", self.placeholders),
            *markers,
        ]
        return [f"{what}: {finding}" for what, finding in found if finding.count]


def _prompt(example: Example) -> Hashable | None:
    """Everything before the last answer; None for plain text and for conversations that do not end in an answer."""
    if example.text is not None or example.messages[-1].role != "assistant":
        return None
    return identity(Example(messages=example.messages[:-1]))
