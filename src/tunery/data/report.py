"""What became of every row: counts for people and for report.md, and the list of what was refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunery.errors import DataError
from tunery.types import Refused

# Refused by a choice of the user's, not because the row is bad: shown, but not counted against data.max_bad.
BY_CHOICE = frozenset({"too long"})
_SHOWN = 5
_PLACES = 3


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is not used: where it is, why, and the number of its source in the report."""

    file: str
    row: int
    reason: str
    detail: str
    source: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Noted:
    """A remark on a row that is used: `what` is a phrase to count by, "rows with ...", `detail` is for this row."""

    what: str
    detail: str = ""


@dataclass
class Finding:
    """Rows with one thing in common: how many, and where the first ones are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < _PLACES:
            self.first.append(where)

    def join(self, other: Finding) -> None:
        """Add rows found elsewhere."""
        self.count += other.count
        self.first = (self.first + other.first)[:_PLACES]

    def __str__(self) -> str:
        return f"{self.count:,} (first: {', '.join(self.first)})"


@dataclass
class SourceReport:
    """One entry of data.train or data.eval. Rows read = used + held_out + overlap + those refused. `noted`: remarks on
    rows that are used. `epoch`: rows and tokens of an epoch, where data.mix is weighted."""

    key: str
    path: str
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    rows: int = 0
    used: int = 0
    held_out: int = 0
    overlap: int = 0
    duplicates: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    truncated: int = 0
    tokens: int = 0
    labelled: int = 0
    noted: dict[str, Finding] = field(default_factory=dict)
    epoch: tuple[int, int] | None = None

    @classmethod
    def load(cls, values: dict[str, Any]) -> SourceReport:
        """From what `asdict` makes."""
        noted = {what: Finding(**finding) for what, finding in values["noted"].items()}
        return cls(**{**values, "noted": noted, "epoch": values["epoch"] and tuple(values["epoch"])})

    @property
    def all_refused(self) -> int:
        return sum(self.refused.values())

    @property
    def bad(self) -> int:
        """Rows refused because something is wrong with them."""
        return sum(count for reason, count in self.refused.items() if reason not in BY_CHOICE)


@dataclass
class SplitReport:
    """One side, training or evaluation, over all its sources. `lengths`: tokens per example, by percentile."""

    examples: int = 0
    sequences: int = 0
    tokens: int = 0
    labelled: int = 0
    truncated: int = 0
    lengths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Any) -> SplitReport:
        lengths = store.lengths
        points = np.percentile(lengths, (0, 25, 50, 75, 90, 99, 100), method="nearest") if len(lengths) else []
        names = ("min", "p25", "p50", "p75", "p90", "p99", "max")
        return cls(
            examples=len(store),
            sequences=int(store.sequence_counts.sum()),
            tokens=int(lengths.sum()),
            labelled=int(store.labelled.sum()),
            truncated=int(store.truncated.sum()),
            lengths={name: int(value) for name, value in zip(names, points, strict=False)},
        )


@dataclass
class DataReport:
    """`cache` is "hit", "built", "off" or "stream"; `seconds` the whole of it; `warnings` sentences."""

    sources: list[SourceReport] = field(default_factory=list)
    train: SplitReport = field(default_factory=SplitReport)
    eval: SplitReport | None = None
    refused: list[RefusedRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cache: str = "off"
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows read, over all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    def refuse(self, source: int, file: str, row: int, why: Refused) -> None:
        """Count a row that cannot be used."""
        reasons = self.sources[source].refused
        reasons[why.reason] = reasons.get(why.reason, 0) + 1
        self.refused.append(RefusedRow(file, row, why.reason, why.detail, source))

    def note(self, source: int, file: str, row: int, remark: Noted) -> None:
        """Count a remark on a row that is used."""
        detail = f" {remark.detail}" if remark.detail else ""
        self.sources[source].noted.setdefault(remark.what, Finding()).add(f"{file}:{row}{detail}")

    def all_warnings(self) -> list[str]:
        """The remarks on rows, over all sources, as sentences; then `warnings`."""
        noted: dict[str, Finding] = {}
        for source in self.sources:
            for what, finding in source.noted.items():
                noted.setdefault(what, Finding()).join(finding)
        return [f"{what}: {finding}" for what, finding in noted.items()] + self.warnings

    def reasons(self) -> dict[str, int]:
        """Refused rows by reason, over all sources, most frequent first."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.refused)
        return dict(total.most_common())

    def first(self, reason: str | None = None, count: int = _SHOWN) -> list[RefusedRow]:
        """The first refused rows, of one reason or of any."""
        return [row for row in self.refused if reason in (None, row.reason)][:count]

    # ------------------------------------------------------------ out

    def to_dict(self) -> dict[str, Any]:
        """Everything but the full list of refused rows (the first few of each reason stand for it)."""
        values = asdict(self)
        del values["refused"]
        values["warnings"] = self.all_warnings()
        first = {reason: [asdict(row) for row in self.first(reason)] for reason in self.reasons()}
        return {**values, "rows": self.rows, "refused": self.reasons(), "first_refused": first}

    def write_refused(self, path: str | Path) -> None:
        """Every refused row as a line of JSON: {"file", "row", "reason", "detail", "source"}."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for row in self.refused:
                line = {**asdict(row), "source": self.sources[row.source].key}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def save(self, path: Path) -> None:
        """All of it as JSON, for `load`."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> DataReport:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            sources=[SourceReport.load(source) for source in values["sources"]],
            train=SplitReport(**values["train"]),
            eval=SplitReport(**values["eval"]) if values["eval"] else None,
            refused=[RefusedRow(**row) for row in values["refused"]],
            warnings=values["warnings"],
            cache=values["cache"],
            seconds=values["seconds"],
        )

    def print(self, console: Any) -> None:
        """A table of the sources, then what was refused and why, then the totals."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("data", overflow="fold")
        table.add_column("format")
        names = ["rows", "used", "held out", "in eval", "copies", "refused", "cut", "tokens", "trained"]
        names += ["rows an epoch", "tokens an epoch"]
        values = [
            [s.rows, s.used, s.held_out, s.overlap, s.duplicates, s.all_refused, s.truncated, s.tokens, s.labelled]
            + list(s.epoch or (0, 0))
            for s in self.sources
        ]
        seldom = ("held out", "in eval", "copies", "cut", "rows an epoch", "tokens an epoch")
        kept = [i for i, name in enumerate(names) if name not in seldom or any(numbers[i] for numbers in values)]
        for i in kept:
            table.add_column(names[i], justify="right")
        for source, numbers in zip(self.sources, values, strict=True):
            side = "eval " if source.key.startswith("data.eval") else ""
            table.add_row(Text(side + source.path), source.format, *[f"{numbers[i]:,}" for i in kept])
        console.print(table)
        for line in self.lines():
            console.print(Text(line), highlight=False, soft_wrap=True)

    def lines(self) -> list[str]:
        """What `print` says below its table."""
        lines = []
        for source in self.sources:
            if source.unread:
                lines.append(f"{source.path}: columns not read: {', '.join(source.unread)}")
        for reason, count in self.reasons().items():
            lines.append(f"refused: {reason}: {count:,}")
            lines += [
                f"  {row.file}:{row.row}" + (f": {row.detail}" if row.detail else "") for row in self.first(reason, 3)
            ]
        for name, side in (("train", self.train), ("eval", self.eval)):
            if side is not None and side.examples:
                spread = ", ".join(f"{point} {value:,}" for point, value in side.lengths.items() if point != "min")
                lines.append(
                    f"{name}: {side.examples:,} examples, {side.sequences:,} sequences, {side.tokens:,} tokens, "
                    f"{side.labelled:,} trained; tokens per example: {spread}"
                )
        lines += [f"warning: {warning}" for warning in self.all_warnings()]
        how = {
            "hit": "from the cache",
            "built": "tokenised and cached",
            "off": "tokenised",
            "stream": "looked at, the others are read while training;",
        }[self.cache]
        lines.append(f"{self.rows:,} rows {how} in {self.seconds:.1f} s ({self.rows_per_second:,.0f} rows/s)")
        return lines


def enforce_share(report: DataReport, max_bad: float) -> None:
    """Raises DataError with the counts by reason and the first rows, where more than `max_bad` of all rows are bad."""
    rows, bad = report.rows, sum(source.bad for source in report.sources)
    if rows and bad / rows > max_bad:
        raise DataError(
            f"{bad:,} of {rows:,} rows cannot be used ({bad / rows:.1%}; data.max_bad is {max_bad:.1%}):\n"
            + _why([row for row in report.refused if row.reason not in BY_CHOICE])
        )


def enforce(report: DataReport, max_bad: float) -> None:
    """Stop before training on bad data: `enforce_share`, and DataError where a source has no usable row at all."""
    enforce_share(report, max_bad)
    for number, source in enumerate(report.sources):
        if not source.used + source.held_out + source.overlap:
            mine = [row for row in report.refused if row.source == number]
            raise DataError(
                f"{source.key}: none of the {source.rows:,} rows of {source.path} can be used:\n{_why(mine)}"
            )


def enforce_learnable(report: DataReport, generates: bool = False) -> None:
    """Raises DataError where a side has nothing to learn from or to measure: no example, or (unless the tokens to train
    on are yet to be generated) no trained token."""
    for key, side in (("train", report.train), ("eval", report.eval)):
        sources = [source for source in report.sources if source.key.startswith(f"data.{key}")]
        if side is None or (key == "train" and not sources):
            continue
        if not side.examples:
            lost = sum(source.overlap for source in sources)
            why = f"; all {lost:,} usable rows are in the evaluation data too" if lost else ""
            refused = f":\n{_why(report.refused)}" if report.refused else ""
            raise DataError(f"data.{key}: no row is left{why}{refused}")
        if not side.labelled and not generates:
            raise DataError(
                f"data.{key}: none of the {side.tokens:,} tokens is trained; the answers have weight 0, or the "
                "objective trains nothing of these rows"
            )


def _why(rows: Sequence[RefusedRow]) -> str:
    counts = Counter(row.reason for row in rows)
    lines = [f"  {reason}: {count:,}" for reason, count in counts.most_common()]
    lines += [f"    {row}" for row in [row for row in rows if row.reason not in BY_CHOICE][:_SHOWN] or rows[:_SHOWN]]
    return "\n".join(lines)
