"""Data larger than memory: rows are read, parsed and tokenised while training, in an order that is a pure function of
(seed, epoch). json files (not jsonl) are read whole, one at a time; everything else a little at a time.

An epoch reads each source's files in a seeded order (unless `samples` asks for the first rows of them) and shuffles
the rows through a buffer. With data.mix weighted, each row comes from a source drawn by weight, and the epoch ends
when every source has been read to its end once; one that ends earlier starts again."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunery.data.examples import identity, read_examples
from tunery.data.report import DataReport, SourceReport, enforce, enforce_share
from tunery.data.sources import Located
from tunery.data.tokenise import encode_examples, too_long
from tunery.errors import DataError
from tunery.types import Example, Refused, Tokens

CHUNK = 256  # rows tokenised at a time
_PROBED = 1000  # rows looked at before training, and before a share of bad ones means something

Origin = tuple[str, int]
Item = tuple[list[Tokens], Origin]
Row = tuple[int, str, int, Example]  # source, file, row, what it became


@dataclass
class Stream:
    """What a stream is made of. `in_eval`: what eval has, and training therefore leaves out; `log` the folder that
    remembers how many examples each chunk gave, so that a restart need not tokenise again what it skips, or None."""

    sources: Sequence[Located]
    template: Any
    objective: Any
    seed: int
    shuffle_buffer: int
    weighted: bool
    max_bad: float
    too_long: str
    in_eval: frozenset[Hashable] = frozenset()
    log: Path | None = None


class StreamingExamples:
    """Tokenised examples in a seeded order, epoch after epoch. `report` counts the rows of the epoch being read; it is
    checked against data.max_bad after the first 1,000 rows and at each chunk."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.report = self._probe()

    def examples(self, epoch: int, start: int = 0) -> Iterator[Item]:
        """(sequences, (file, row)) of an epoch's examples from number `start` on: the same, bit for bit, as if those
        before had been taken. Raises DataError where too many rows are bad."""
        yield from self._walk(epoch, start)

    def forever(self, start: int = 0) -> Iterator[Item]:
        """Examples over epoch after epoch, from number `start` on, counted from the beginning of epoch 0."""
        for epoch in itertools.count():
            log = _Log(self.stream.log, epoch)
            if log.total is not None and log.total <= start:
                start -= log.total
                continue
            total = yield from self._walk(epoch, start)
            if not total:
                raise DataError("data.train: the stream has no usable row")
            start = max(0, start - total)

    def _walk(self, epoch: int, start: int) -> Generator[Item, None, int]:
        """The items from `start` on; returns how many the epoch has."""
        self.report = report = DataReport([_fresh(source) for source in self.report.sources], cache="stream")
        log = _Log(self.stream.log, epoch)
        rows = self._shuffled(self._rows(epoch, report), epoch)
        seen = 0
        for number in itertools.count():
            chunk = list(itertools.islice(rows, CHUNK))
            if not chunk:
                break
            known = log.counts.get(number)
            if known is not None and seen < start and seen + known <= start:
                seen += known
                continue
            items = self._encode(chunk, report)
            log.add(number, len(items))
            yield from items[max(0, start - seen) :]
            seen += len(items)
        enforce(report, self.stream.max_bad)
        log.finish(seen)
        return seen

    def _encode(self, chunk: list[Row], report: DataReport) -> list[Item]:
        kept, marks = encode_examples([example for *_, example in chunk], self.stream.objective, self.stream.template)
        for number, why in marks.refused:
            source, file, row, _ = chunk[number]
            if why.reason == "too long" and self.stream.too_long == "error":
                raise too_long(file, row, why)
            report.sources[source].used -= 1
            report.refuse(source, file, row, why)
        for number, remark in marks.noted:
            report.note(*chunk[number][:3], remark)
        for number, sequences in kept:
            source = report.sources[chunk[number][0]]
            source.sequences += len(sequences)
            source.tokens += sum(len(tokens) for tokens in sequences)
            source.labelled += sum(tokens.labelled for tokens in sequences)
            source.truncated += any(tokens.extra.get("truncated") for tokens in sequences)
        if report.rows >= _PROBED:
            enforce_share(report, self.stream.max_bad)
        return [(list(sequences), (chunk[number][1], chunk[number][2])) for number, sequences in kept]

    # ------------------------------------------------------------ the order of the rows

    def _rows(self, epoch: int, report: DataReport) -> Iterator[Row]:
        """The usable rows of an epoch before shuffling."""
        if self.stream.weighted:
            return self._drawn(epoch, report)
        return itertools.chain.from_iterable(self._read(k, epoch, report) for k in range(len(self.stream.sources)))

    def _read(self, number: int, epoch: int, report: DataReport) -> Iterator[Row]:
        """The usable rows of one source; the others are counted on the way."""
        source, counts = self.stream.sources[number], report.sources[number]
        if self.stream.shuffle_buffer > 1 and source.source.samples is None:
            order = self._random(epoch, 2, number).permutation(len(source.files))
            source = replace(source, files=tuple(source.files[i] for i in order))
        for file, row, example in read_examples(source, counts, streaming=True):
            if isinstance(example, Refused):
                report.refuse(number, file, row, example)
            elif self.stream.in_eval and identity(example) in self.stream.in_eval:
                counts.overlap += 1
            else:
                counts.used += 1
                yield number, file, row, example

    def _drawn(self, epoch: int, report: DataReport) -> Iterator[Row]:
        """Rows from sources drawn by weight, until each has ended once."""
        weights = np.array([source.source.weight for source in self.stream.sources])
        rng = self._random(epoch, 3)
        readers = [self._read(number, epoch, report) for number in range(len(weights))]
        ended = np.zeros(len(weights), dtype=bool)
        while True:
            for number in rng.choice(len(weights), size=1024, p=weights / weights.sum()).tolist():
                row = next(readers[number], None)
                if row is None:
                    ended[number] = True
                    if ended.all():
                        return
                    readers[number] = self._read(number, epoch, report)
                    row = next(readers[number], None)
                if row is not None:
                    yield row

    def _shuffled(self, rows: Iterator[Row], epoch: int) -> Iterator[Row]:
        """Each row waits in a buffer until a later one, or the end, draws its place."""
        size = self.stream.shuffle_buffer
        if size == 1:
            yield from rows
            return
        rng = self._random(epoch, 4)
        buffer = list(itertools.islice(rows, size))
        places: list[int] = []
        for row in rows:
            if not places:
                places = rng.integers(0, size, 4096).tolist()
            place = places.pop()
            yield buffer[place]
            buffer[place] = row
        for place in rng.permutation(len(buffer)).tolist():
            yield buffer[place]

    def _random(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.stream.seed, epoch, *purpose]))

    def _probe(self) -> DataReport:
        """Look at the first rows of each source, so that what is wrong with them is said before training."""
        report = DataReport([SourceReport(source.key, source.name) for source in self.stream.sources], cache="stream")
        for number, source in enumerate(self.stream.sources):
            rows: list[Row] = []
            first = read_examples(source, report.sources[number], streaming=True)
            for file, row, example in itertools.islice(first, _PROBED):
                if isinstance(example, Refused):
                    report.refuse(number, file, row, example)
                else:
                    report.sources[number].used += 1
                    rows.append((number, file, row, example))
            self._encode(rows, report)
        enforce(report, self.stream.max_bad)
        for source in report.sources:
            if not source.labelled:
                raise DataError(f"{source.key}: none of the tokens of its first {source.rows:,} rows is trained")
        return report


def _fresh(source: SourceReport) -> SourceReport:
    """The same source with its format, and nothing counted."""
    return SourceReport(source.key, source.path, source.format, source.columns, source.unread)


class _Log:
    """How many examples each chunk of an epoch gave, appended as pairs (chunk, examples) of sixteen bytes. Several
    processes may write one log, since all write the same. Chunk -1 is the epoch's total."""

    def __init__(self, folder: Path | None, epoch: int):
        self.path = folder / f"epoch-{epoch}.counts" if folder is not None else None
        self.counts: dict[int, int] = {}
        if self.path is not None and self.path.exists():
            data = self.path.read_bytes()
            self.counts = dict(struct.iter_unpack("<qq", data[: len(data) // 16 * 16]))

    @property
    def total(self) -> int | None:
        return self.counts.get(-1)

    def add(self, chunk: int, examples: int) -> None:
        if self.path is not None and chunk not in self.counts:
            self.counts[chunk] = examples
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(struct.pack("<qq", chunk, examples))

    def finish(self, total: int) -> None:
        self.add(-1, total)
