"""Sources to token stores, without a cache: read, parse, split, set eval apart from train, tokenise, count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tunery.data.examples import identity, read_examples, whole_identity
from tunery.data.report import DataReport, SourceReport, SplitReport, enforce, enforce_learnable
from tunery.data.sources import Located
from tunery.data.store import TokenStore, pack_store
from tunery.data.tokenise import Origin, paused_gc, tokenise, too_long
from tunery.errors import DataError
from tunery.types import Example, Refused


@dataclass(frozen=True)
class Inputs:
    """What build() works from. `fraction` of the train rows is held out where it is not None; `beat` is called now
    and then, as a sign of life."""

    train: list[Located]
    eval: list[Located]
    fraction: float | None
    max_bad: float
    too_long: str
    workers: int | None
    seed: int
    template: Any
    objective: Any
    console: Any = None
    beat: Callable[[], None] = lambda: None


@dataclass
class Built:
    """`eval_examples` are the conversations of `eval`, in its order; `train_examples` those of `train` for an objective
    that generates (else none)."""

    train: TokenStore
    eval: TokenStore | None
    eval_examples: list[Example]
    report: DataReport
    train_examples: list[Example] = field(default_factory=list)


@dataclass
class Rows:
    """Parsed examples beside where they came from. `held_out`: taken from the training sources by a fraction."""

    examples: list[Example] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    held_out: bool = False

    def add(self, example: Example, origin: Origin) -> None:
        self.examples.append(example)
        self.origins.append(origin)

    def keep(self, numbers: list[int]) -> Rows:
        return Rows([self.examples[i] for i in numbers], [self.origins[i] for i in numbers], self.held_out)

    def without(self, dropped: set[int]) -> Rows:
        return self.keep([i for i in range(len(self.examples)) if i not in dropped]) if dropped else self


def build(inputs: Inputs) -> Built:
    """Read and tokenise everything. Raises ConfigError and DataError; see dataset.prepare."""
    report = DataReport([SourceReport(source.key, source.name) for source in inputs.train + inputs.eval])
    generates = getattr(inputs.objective, "generates", False)  # its rows are prompts; rewards read the other columns
    keeps = generates or getattr(inputs.objective, "reads_columns", False)
    files: dict[str, int] = {}
    with paused_gc():
        train, held = Rows(), Rows()
        for number, source in enumerate(inputs.train + inputs.eval):
            rows = read_examples(source, report.sources[number], keep_columns=keeps)
            _take(rows, number, report, files, train if number < len(inputs.train) else held)
            inputs.beat()
        if inputs.fraction is not None:
            train, held = _hold_out(train, inputs.fraction, inputs.seed)
        has_eval = inputs.fraction is not None or bool(inputs.eval)
        train = _set_apart(train, held, report)
        _count_used(report, train, 1)
        _count_used(report, held, 1)
        enforce(report, inputs.max_bad)
    names = list(files)
    total = len(train.examples) + len(held.examples)
    with _progress(inputs.console, total) as advance:
        train_store, used = _tokenised(train, names, inputs, report, advance)
        eval_store, kept = _tokenised(held, names, inputs, report, advance)
    _count(report, train_store, eval_store, has_eval)
    enforce(report, inputs.max_bad)
    enforce_learnable(report, generates)
    return Built(
        train_store, eval_store if has_eval else None, [held.examples[i] for i in kept], report,
        [train.examples[i] for i in used] if generates else [],
    )  # fmt: skip


def _take(
    rows: Iterator[tuple[str, int, Example | Refused]], number: int, report: DataReport, files: dict[str, int],
    into: Rows,
) -> None:  # fmt: skip
    for file, row, example in rows:
        if isinstance(example, Refused):
            report.refuse(number, file, row, example)
        else:
            into.add(example, (number, files.setdefault(file, len(files)), row))


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """A seeded draw of a fraction of the rows, at least one. Rows that say the same go together, so that training keeps
    its copies of all others; where even the smallest such group is over the fraction, it is held out. Raises DataError
    where nothing would be left."""
    count = max(1, round(fraction * len(rows.examples)))
    order = np.random.Generator(np.random.PCG64([seed, 0])).permutation(len(rows.examples)).tolist()
    groups: dict[Hashable, list[int]] = {}
    for number in order:
        groups.setdefault(identity(rows.examples[number]), []).append(number)
    chosen: list[int] = []
    for group in groups.values():
        if len(chosen) + len(group) <= count:
            chosen += group
        if len(chosen) == count:
            break
    chosen = sorted(chosen or min(groups.values(), key=len, default=[]))
    if len(chosen) >= len(rows.examples):
        copies = " that say the same" if len(groups) == 1 and count < len(rows.examples) else ""
        raise DataError(
            f"data.eval: cannot hold out {fraction:g} of {len(rows.examples):,} usable rows{copies} and train on the "
            "others"
        )
    return rows.without(set(chosen)), replace(rows.keep(chosen), held_out=True)


def _set_apart(train: Rows, held: Rows, report: DataReport) -> Rows:
    """Train without the rows that eval has too; duplicates that remain are counted, and stay."""
    in_eval = {identity(example) for example in held.examples}
    seen: set[Hashable] = set()
    dropped = set()
    for number, example in enumerate(train.examples):
        source = report.sources[train.origins[number][0]]
        if in_eval and identity(example) in in_eval:
            source.overlap += 1
            dropped.add(number)
            continue
        same = whole_identity(example)
        if same in seen:
            source.duplicates += 1
        seen.add(same)
    return train.without(dropped)


def _count_used(report: DataReport, rows: Rows, by: int) -> None:
    for source, _, _ in rows.origins:
        if rows.held_out:
            report.sources[source].held_out += by
        else:
            report.sources[source].used += by


def _tokenised(
    rows: Rows, files: list[str], inputs: Inputs, report: DataReport, advance: Callable[[int], None]
) -> tuple[TokenStore, list[int]]:
    """(the store, the numbers of the usable rows)."""

    def progress(count: int) -> None:
        advance(count)
        inputs.beat()

    chunks, marks = tokenise(rows.examples, rows.origins, inputs.objective, inputs.template, inputs.workers, progress)
    for number, why in marks.refused:
        source, file, row = rows.origins[number]
        if why.reason == "too long" and inputs.too_long == "error":
            raise too_long(files[file], row, why)
        report.refuse(source, files[file], row, why)
    for number, remark in marks.noted:
        source, file, row = rows.origins[number]
        report.note(source, files[file], row, remark)
    _count_used(report, rows.keep([number for number, _ in marks.refused]), -1)
    bad = {number for number, _ in marks.refused}
    return pack_store(chunks, files), [i for i in range(len(rows.examples)) if i not in bad]


def _count(report: DataReport, train: TokenStore, held: TokenStore, has_eval: bool) -> None:
    """Sequences and tokens, by source and by side."""
    report.train = SplitReport.of(train)
    report.eval = SplitReport.of(held) if has_eval else None
    for store in (train, held):
        counts = (store.sequence_counts, store.truncated, store.lengths, store.labelled)
        for number in np.unique(store.source).tolist():
            mine = store.source == number
            entry = report.sources[number]
            entry.sequences += int(counts[0][mine].sum())
            entry.truncated += int(counts[1][mine].sum())
            entry.tokens += int(counts[2][mine].sum())
            entry.labelled += int(counts[3][mine].sum())


@contextlib.contextmanager
def _progress(console: Any, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of rows on the console, where there is one."""
    if console is None:
        yield lambda rows: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(rows: int) -> None:
            bar.advance(task, rows)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.0f} rows/s" if speed else "")

        yield advance
