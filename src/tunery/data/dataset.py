"""From the `data:` section to tokenised examples: read, parse, check, split, tokenise, cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from tunery.config import Config, ShortForms
from tunery.data.build import Built, Inputs, build
from tunery.data.cache import CacheEntry, cache_folder, code_digest, file_digest, key_of, rank
from tunery.data.examples import from_dict, identity, to_dict
from tunery.data.formats import load_format
from tunery.data.report import DataReport, SplitReport, enforce
from tunery.data.sources import Located, Source, load_hub, locate
from tunery.data.store import TokenStore
from tunery.data.stream import Stream, StreamingExamples
from tunery.errors import ConfigError, DataError
from tunery.types import Example

_ACCEPTED = "a path, a mapping {path: ...}, or a list of these"


def _sources(value: Any) -> Any:
    """A path, a mapping, or a list of either -> a list of mappings."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | Mapping | Source) for item in items):
        raise ValueError(f"expected {_ACCEPTED}")
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _held(value: Any) -> Any:
    """The same, or a fraction, or nothing."""
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    if isinstance(value, int | float):
        raise ValueError(f"expected a fraction between 0 and 1, such as 0.02, or {_ACCEPTED}")
    return _sources(value)


Sources = Annotated[list[Source], BeforeValidator(_sources), ShortForms("path")]


class DataConfig(Config):
    """The `data:` section."""

    train: Sources = Field(default=[], description="path, list, or {path, format, columns, weight, samples, split}")
    eval: Annotated[list[Source] | float | None, BeforeValidator(_held), ShortForms("path")] = Field(
        default=None, description="the same as train, or a fraction of it to hold out, such as 0.02"
    )
    dataset_dir: str | None = Field(
        default=None, description="folder of dataset_info.json; names in train/eval are looked up there"
    )
    template: str = Field(
        default="auto", description="auto (the tokenizer's own), a named one, or a path to a .jinja file"
    )
    system: str | None = Field(default=None, description="system message for rows that have none")
    max_length: int = Field(default=1024, ge=8, description="longest sequence, in tokens")
    too_long: Literal["drop", "truncate", "error"] = Field(default="drop", description="what happens to longer rows")
    max_bad: float = Field(
        default=0.05, ge=0, le=1, description="stop when more than this share of the rows cannot be used"
    )
    mix: Literal["concat", "weighted"] = Field(
        default="concat", description="concat: every row once an epoch; weighted: by weight"
    )
    streaming: bool = Field(default=False, description="read while training, for data larger than memory")
    shuffle_buffer: int = Field(default=16384, ge=1, description="rows held for shuffling when streaming")
    workers: int | None = Field(default=None, ge=1, description="tokenising processes (default: one per core)")
    cache: bool = Field(default=True, description="keep tokenised data in TUNERY_CACHE (default ~/.cache/tunery)")


@dataclass
class Prepared:
    """Data ready for training: `train` a TokenStore, or a StreamingExamples where data.streaming; `eval` the held-out
    examples, tokenised, and `eval_examples` the same as conversations, for generation (in the order they were read;
    rows refused in tokenising are not among them). `located` are the training sources. `train_examples`, of an
    objective that generates: the examples of `train`, in its order."""

    train: TokenStore | StreamingExamples
    eval: TokenStore | None
    eval_examples: list[Example]
    report: DataReport
    located: list[Located] = field(default_factory=list)
    train_examples: list[Example] = field(default_factory=list)


def prepare(
    config: DataConfig, template: Any, objective: Any, *, seed: int, cache_key: str = "", console: Any = None
) -> Prepared:
    """Everything about the data, before any model is loaded: find, read, parse, check, split, tokenise.

    `template` has encode_many, encode_texts, unwritable and fingerprint (data/template.py), `objective` rows
    (objectives/); `cache_key` is whatever else decides the tokens; `console` a rich console for the progress
    bar. Raises ConfigError and DataError."""
    started = time.perf_counter()
    check_config(config)
    if config.streaming and getattr(objective, "generates", False):
        raise ConfigError("data.streaming: an objective that generates keeps its prompts in memory; set it to false")
    train = [locate(s, f"data.train[{i}]", config.dataset_dir) for i, s in enumerate(config.train)]
    held = config.eval if isinstance(config.eval, list) else []
    eval_ = [locate(s, f"data.eval[{i}]", config.dataset_dir) for i, s in enumerate(held)]
    inputs = Inputs(
        train=train,
        eval=eval_,
        fraction=config.eval if isinstance(config.eval, float) else None,
        max_bad=config.max_bad,
        too_long=config.too_long,
        workers=config.workers,
        seed=seed,
        template=template,
        objective=objective,
        console=console,
    )
    if config.streaming:
        made = _streamed(config, inputs, cache_key)
        made.report.seconds = time.perf_counter() - started
        return made
    generates = getattr(objective, "generates", False)
    # Rewards want the rows themselves, which the cache does not keep, and prompts are tokenised in no time.
    built = _cached(inputs, cache_key) if config.cache and not generates else build(inputs)
    built.report.seconds = time.perf_counter() - started
    enforce(built.report, config.max_bad)
    store = built.train
    if config.mix == "weighted":
        store = store.select(mix([source.source.weight for source in train], store.source, seed))
        built.report.train = SplitReport.of(store)
        drawn = store.source[store.index]
        for number, entry in enumerate(built.report.sources[: len(train)]):
            mine = drawn == number
            entry.epoch = int(mine.sum()), int(store.lengths[mine].sum())
    examples = built.train_examples
    if examples and store.index is not None:
        examples = [examples[i] for i in store.index.tolist()]
    return Prepared(store, built.eval, built.eval_examples, built.report, train, examples)


def _streamed(config: DataConfig, inputs: Inputs, cache_key: str) -> Prepared:
    """Train from a stream, with the evaluation data in memory."""
    held = None
    if inputs.eval:
        only_eval = replace(inputs, train=[])
        held = _cached(only_eval, cache_key) if config.cache else build(only_eval)
        enforce(held.report, config.max_bad)
    examples = held.eval_examples if held else []
    stream = StreamingExamples(
        Stream(
            sources=inputs.train,
            template=inputs.template,
            objective=inputs.objective,
            seed=inputs.seed,
            shuffle_buffer=config.shuffle_buffer,
            weighted=config.mix == "weighted",
            max_bad=config.max_bad,
            too_long=config.too_long,
            in_eval=frozenset(identity(example) for example in examples),
            log=_stream_log(config, inputs, cache_key) if config.cache else None,
        )
    )
    report = stream.report
    if held is not None:
        shift = len(report.sources)
        report = replace(
            report,
            sources=report.sources + held.report.sources,
            eval=held.report.eval,
            refused=report.refused + [replace(row, source=row.source + shift) for row in held.report.refused],
        )
    return Prepared(stream, held.eval if held else None, examples, report, inputs.train)


def _stream_log(config: DataConfig, inputs: Inputs, cache_key: str) -> Path:
    """The folder that remembers a stream's chunks. Files are known by size and time: they are too large to hash."""

    def seen(source: Located) -> list[Any]:
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files]

    name = key_of(
        {
            "sources": [[source.source.model_dump(mode="json"), source.hub, seen(source)] for source in inputs.train],
            "eval": [_content(source) for source in inputs.eval],
            "order": [inputs.seed, config.shuffle_buffer, config.mix],
            "tokens": _tokens_key(inputs, cache_key),
        }
    )
    return cache_folder() / "streams" / name


def check_config(config: DataConfig) -> None:
    """What can be said before any file is opened. Raises ConfigError."""
    if not config.train:
        raise ConfigError("data.train: no data given; name a file, a folder, a hub data set, or a list of them")
    if config.streaming and isinstance(config.eval, float):
        raise ConfigError(
            f"data.eval: {config.eval} of a stream cannot be held out, since its length is not known; "
            "name evaluation data"
        )
    if config.mix == "concat":
        for number, source in enumerate(config.train):
            if source.weight != 1.0:
                raise ConfigError(
                    f"data.train[{number}].weight is {source.weight}, but data.mix is concat, which takes every row "
                    "once; set data.mix: weighted"
                )


def mix(weights: Sequence[float], sources: np.ndarray, seed: int) -> np.ndarray:
    """The examples of a weighted epoch, int64 [as many as there are]: source k has weights[k] / sum(weights) of them.

    `sources` int32 [E] is the source of each example. A source's share is filled with whole passes over it, and the
    rest with a draw without replacement, so its rows are used equally often, give or take one. The draw is a pure
    function of the seed and the same in every epoch. A source without examples has no share."""
    there = [np.flatnonzero(sources == k) for k in range(len(weights))]
    share = np.array([w if len(rows) else 0.0 for w, rows in zip(weights, there, strict=True)])
    exact = share / share.sum() * len(sources)
    counts = np.floor(exact).astype(np.int64)
    short = len(sources) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1  # the largest remainders
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    parts = []
    for rows, count in zip(there, counts.tolist(), strict=True):
        if count:
            passes, rest = divmod(count, len(rows))
            parts += [np.tile(rows, passes), np.sort(rng.choice(rows, rest, replace=False))]
    return np.concatenate(parts).astype(np.int64)


# ---------------------------------------------------------------- the cache around build()


def _cached(inputs: Inputs, cache_key: str) -> Built:
    entry = CacheEntry(_key(inputs, cache_key))
    say = inputs.console.print if inputs.console is not None else (lambda line: None)
    if rank() != 0:
        return _wait_and_load(entry, say)
    if entry.exists():
        try:
            built = _load(entry.folder)
            built.report.cache = "hit"
            return built
        except DataError as error:
            say(f"building the tokenised data again: {error}")
            entry.remove()
    entry.claim()
    try:
        built = build(replace(inputs, beat=entry.beat))
        with entry.writing() as folder:
            built.train.save(folder / "train")
            if built.eval is not None:
                built.eval.save(folder / "eval")
            texts = [json.dumps(to_dict(example), ensure_ascii=False) for example in built.eval_examples]
            (folder / "eval.jsonl").write_text("".join(text + "\n" for text in texts), encoding="utf-8")
            built.report.cache = "built"
            built.report.save(folder / "report.json")
    finally:
        entry.done()
    return built


def _wait_and_load(entry: CacheEntry, say: Callable[[str], None]) -> Built:
    """What rank 0 makes. It finds a damaged entry as this rank does, and builds it again."""
    damaged = None
    while True:
        entry.wait(say, damaged=damaged)
        damaged = entry.stamp()
        try:
            built = _load(entry.folder)
        except DataError:
            continue
        built.report.cache = "hit"
        return built


def _load(folder: Path) -> Built:
    """A cache entry. Raises DataError where it is damaged."""
    train = TokenStore.load(folder / "train")
    eval_store = TokenStore.load(folder / "eval") if (folder / "eval").exists() else None
    try:
        report = DataReport.load(folder / "report.json")
        lines = (folder / "eval.jsonl").read_text(encoding="utf-8").split("\n")
        examples = [from_dict(json.loads(line)) for line in lines if line]
        if (eval_store is None) != (report.eval is None):
            raise ValueError("the evaluation data is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the cache entry cannot be read: {error}") from None
    return Built(train, eval_store, examples, report)


def _key(inputs: Inputs, cache_key: str) -> str:
    """The name of the cache entry: everything that decides what build() returns."""
    return key_of(
        {
            "sources": [_content(source) for source in inputs.train + inputs.eval],
            "train": len(inputs.train),
            # The seed only chooses the rows held out.
            "eval": None if inputs.fraction is None else [inputs.fraction, inputs.seed],
            "tokens": _tokens_key(inputs, cache_key),
        }
    )


def _tokens_key(inputs: Inputs, cache_key: str) -> list[Any]:
    """What decides the tokens of a given row."""
    objective = inputs.objective
    config = getattr(objective, "config", None)
    modules = [type(objective).__module__, type(inputs.template).__module__]
    outside = {source.source.format for source in inputs.train + inputs.eval if "." in source.source.format}
    modules += sorted(load_format(name).__name__ for name in outside)
    return [
        inputs.template.fingerprint,
        inputs.too_long,
        type(objective).__module__,
        config.model_dump(mode="json") if config is not None else None,
        code_digest(*modules),
        cache_key,
    ]


def _content(located: Located) -> dict[str, Any]:
    """What a source is and holds: its options, and a hash of its bytes."""
    options = located.source.model_dump(mode="json", exclude={"weight"})
    if located.hub is None:
        return {**options, "files": [[str(path), file_digest(path)] for path in located.files]}
    data, split = load_hub(located)
    return {**options, "files": [split, *[file_digest(Path(file["filename"])) for file in data.cache_files]]}
