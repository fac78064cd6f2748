"""Examples to flat arrays of tokens, over several processes where there is enough to do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

from tunery.data.report import Noted
from tunery.data.store import Chunk
from tunery.errors import DataError
from tunery.types import Example, Refused, Tokens

CHUNK = 1000
_ENOUGH = 2000  # fewer rows are done sooner than processes are started

Origin = tuple[int, int, int]  # source, file index, row


class Marks(NamedTuple):
    """What is to be said of examples, by their numbers: why one is not used, remarks on one that is."""

    refused: list[tuple[int, Refused]]
    noted: list[tuple[int, Noted]]


Encoded = tuple[Chunk, Marks]

# What the worker processes inherit by fork: (examples, origins, objective, template).
_inherited: tuple[Sequence[Example], Sequence[Origin], Any, Any] | None = None


def tokenise(
    examples: Sequence[Example],
    origins: Sequence[Origin],
    objective: Any,
    template: Any,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[list[Chunk], Marks]:
    """The usable examples as chunks in order, and what is to be said of all. `progress` is called with the rows of
    each finished chunk. Raises DataError where a worker process dies."""
    count = worker_count(len(examples), workers)
    source = _in_processes if count > 1 else _in_line
    chunks: list[Chunk] = []
    marks = Marks([], [])
    for start, (chunk, more) in zip(
        range(0, len(examples), CHUNK), source(examples, origins, objective, template, count), strict=True
    ):
        chunks.append(chunk)
        marks.refused.extend(more.refused)
        marks.noted.extend(more.noted)
        progress(min(CHUNK, len(examples) - start))
    return chunks, marks


def worker_count(rows: int, workers: int | None) -> int:
    """How many processes tokenise this many rows: one where that is as fast, or forking would not be safe."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if rows <= _ENOUGH or workers == 1 or not _may_fork():
        return 1
    return min(workers, -(-rows // CHUNK))


def _may_fork() -> bool:
    """Not on macOS, whose libraries break in forked children, nor with a CUDA context, nor inside a daemon."""
    if not sys.platform.startswith("linux"):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return False
    import multiprocessing

    return not multiprocessing.current_process().daemon


def encode_examples(
    examples: Sequence[Example], objective: Any, template: Any
) -> tuple[list[tuple[int, Sequence[Tokens]]], Marks]:
    """(number, sequences) of what can be trained, and what is to be said of the rows. Each sequence of a text becomes
    an example of its own: nothing makes them share a step, and a book must not become one stream.

    An objective may have `unused(example)`: what it leaves of a row that it uses, as "rows with ..., which ...", or
    None."""
    kept: list[tuple[int, Sequence[Tokens]]] = []
    marks = Marks([], [])
    unused = getattr(objective, "unused", None)
    rows = objective.rows(examples, template)
    usable = [number for number, row in enumerate(rows) if row and not isinstance(row, Refused)]
    lost = dict(zip(usable, template.unwritable([examples[number] for number in usable]), strict=True))
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        why = row if isinstance(row, Refused) else lost.get(number, Refused("nothing to train"))
        if isinstance(row, Refused) or isinstance(why, Refused):
            marks.refused.append((number, why))
            continue
        marks.noted.extend((number, remark) for remark in why)
        if unused is not None and (what := unused(example)):
            marks.noted.append((number, Noted(what)))
        kept += [(number, [tokens]) for tokens in row] if example.text is not None else [(number, row)]
    return kept, marks


def _encode_chunk(
    start: int, examples: Sequence[Example], origins: Sequence[Origin], objective: Any, template: Any
) -> Encoded:
    kept, marks = encode_examples(examples[start : start + CHUNK], objective, template)
    chunk = Chunk([row for _, row in kept], [origins[start + number] for number, _ in kept])
    refused = [(start + number, why) for number, why in marks.refused]
    return chunk, Marks(refused, [(start + number, remark) for number, remark in marks.noted])


def _in_line(
    examples: Sequence[Example], origins: Sequence[Origin], objective: Any, template: Any, count: int
) -> Iterator[Encoded]:
    for start in range(0, len(examples), CHUNK):
        yield _encode_chunk(start, examples, origins, objective, template)


def _in_processes(
    examples: Sequence[Example], origins: Sequence[Origin], objective: Any, template: Any, count: int
) -> Iterator[Encoded]:
    """The same in `count` forked processes, which inherit the examples and hand back arrays."""
    global _inherited
    _inherited = (examples, origins, objective, template)
    gc.freeze()  # else the children's collectors would touch, and so copy, every page of the examples
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("fork"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    try:
        with warnings.catch_warnings():
            # Python warns of forking with threads alive; the children only use the tokenizer, which handles a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            futures = [pool.submit(_work, start) for start in range(0, len(examples), CHUNK)]
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed, most often for want of memory; try data.workers: 1, or "
            "data.streaming: true"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()
        _inherited = None


def _start_worker(parent: int) -> None:
    # A parent that is killed outright cannot stop its workers: let the kernel do it (prctl(2), PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above
    gc.enable()  # it may be off in the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _work(start: int) -> Encoded:
    assert _inherited is not None
    return _encode_chunk(start, *_inherited)


def too_long(file: str, row: int, why: Refused) -> DataError:
    """The error of data.too_long: error."""
    return DataError(
        f"{file}:{row}: the row is too long ({why.detail}); raise data.max_length, or set data.too_long to "
        "drop or truncate"
    )


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection while many long-lived objects are made, which it would walk again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
