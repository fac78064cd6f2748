"""Where rows come from: local files and folders, hub names, and LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tunery.config import Config
from tunery.data.files import EXTENSIONS, missing, read_file, without_nulls
from tunery.data.formats import load_format
from tunery.errors import ConfigError, DataError
from tunery.types import Refused


class Source(Config):
    """One data set. In YAML a bare path or name stands for {path: ...}."""

    path: str = Field(description="a file, a folder, a hub name, or a name in dataset_info.json")
    format: str = Field("auto", description="auto, or a file name in data/formats: alpaca, sharegpt, openai, text")
    columns: dict[str, str] = Field({}, description="our column name -> the data's, e.g. {prompt: question}")
    tags: dict[str, str] = Field({}, description="sharegpt tags as in dataset_info.json, e.g. {role_tag: role}")
    weight: float = Field(1.0, gt=0, description="share of this source when data.mix is weighted")
    samples: int | None = Field(None, gt=0, description="use only the first n rows")
    split: str | None = Field(None, description="split of a hub data set, or of a folder with train and test files")
    subset: str | None = Field(None, description="configuration (subset) of a hub data set")
    revision: str | None = Field(None, description="commit, tag or branch of a hub data set")
    documents: Literal["line", "paragraph", "file"] = Field(
        "line", description="what one document of a txt file is (paragraph: up to a blank line)"
    )


@dataclass(frozen=True)
class Located:
    """A source that was found: `files` on this machine, or a `hub` name (with a folder of it, where one is meant).
    `key` is its place in the configuration, for messages; `defaults` are columns under the names that
    dataset_info.json implies ("" for none), where the source does not name them itself; `ranking` names the entry of
    dataset_info.json that says its rows are preference pairs."""

    source: Source
    key: str
    files: tuple[Path, ...] = ()
    hub: str | None = None
    hub_folder: str | None = None
    defaults: dict[str, str] = field(default_factory=dict)
    ranking: str = ""

    @property
    def name(self) -> str:
        return self.source.path


def locate(source: Source, key: str = "data.train", dataset_dir: str | None = None) -> Located:
    """Find a source, without reading it. A name in dataset_info.json comes first, then a path on this machine, then
    a hub name. Raises ConfigError or DataError naming the nearest thing there is."""
    if source.format != "auto":
        try:
            load_format(source.format)
        except ConfigError as error:
            raise ConfigError(f"{key}.format: {error}") from error
    names: list[str] = []
    if dataset_dir is not None:
        from tunery.data.dataset_info import look_up, read_info

        info = read_info(Path(dataset_dir))
        if source.path in info:
            return look_up(source, key, Path(dataset_dir), info[source.path])
        names = list(info)
    path = Path(source.path).expanduser()
    if path.exists():
        return Located(source, key, files=local_files(path, source, key))
    near = difflib.get_close_matches(source.path, names, n=1, cutoff=0.6)
    if near:
        raise ConfigError(
            f"{key}: {source.path!r} is not in {dataset_dir}/dataset_info.json; did you mean {near[0]!r}?"
        )
    if looks_like_hub(source.path):
        return Located(source, key, hub=source.path)
    raise missing(path)


def looks_like_hub(name: str) -> bool:
    """Whether a name that is not a path here can be one on the hub: owner/name, and no folder of the owner's name."""
    return (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
        and Path(name).suffix.lower() not in EXTENSIONS
        and not Path(name).parent.is_dir()
    )


_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
# Descriptions of data that lie beside it.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def local_files(path: Path, source: Source, key: str) -> tuple[Path, ...]:
    """The data files of a path: itself, or all that a folder holds, sorted. Raises where a folder mixes splits."""
    for name, value in (("subset", source.subset), ("revision", source.revision)):
        if value is not None:
            raise ConfigError(f"{key}.{name}: {path} is on this machine; {name} is for hub data sets")
    if path.is_file():
        if source.split is not None:
            raise ConfigError(f"{key}.split: {path} is a file; split is for hub data sets and folders")
        if path.suffix.lower() not in EXTENSIONS:
            raise DataError(f"{path}: unknown kind of file (known: {' '.join(EXTENSIONS)})")
        return (path,)
    inside = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    files = [
        file
        for file in inside
        if file.suffix.lower() in EXTENSIONS
        and file.name not in _NOT_DATA
        and not any(part.startswith(".") for part in file.parts)
    ]
    if not files:
        raise DataError(f"{path}: the folder holds no data files (looked for: {' '.join(EXTENSIONS)})")
    splits = {file: _split_of(file) for file in files}
    known = sorted({split for split in splits.values() if split})
    if source.split is not None:
        wanted = _SPLITS.get(source.split.lower(), source.split)
        files = [file for file in files if splits[file] == wanted]
        if not files:
            raise DataError(f"{key}.split: no file of {path} is of split {source.split!r} (there: {', '.join(known)})")
    elif len(known) > 1:
        raise DataError(
            f"{path}: the folder holds files of several splits ({', '.join(known)}); say which with {key}.split"
        )
    return tuple(path / file for file in files)


def _split_of(file: Path) -> str | None:
    for part in (file.stem, *reversed(file.parts[:-1])):
        for word in re.split(r"[-_.]", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def read_rows(located: Located, streaming: bool = False) -> Iterator[tuple[str, int, dict[str, Any] | Refused]]:
    """(file, 1-based row, the row or why it cannot be read) of a source: the first `samples` of them, usable or not."""
    rows = _read_hub(located, streaming) if located.hub else _read_files(located)
    return itertools.islice(rows, located.source.samples)


def _read_files(located: Located) -> Iterator[tuple[str, int, dict[str, Any] | Refused]]:
    for path in located.files:
        name = str(path)
        for number, row in read_file(path, located.source.documents):
            yield name, number, row


def _read_hub(located: Located, streaming: bool) -> Iterator[tuple[str, int, dict[str, Any] | Refused]]:
    data, split = load_hub(located, streaming)
    name = f"{located.hub}:{split}"
    for number, row in enumerate(data, 1):
        yield name, number, without_nulls(row)


def load_hub(located: Located, streaming: bool = False) -> tuple[Any, str]:
    """(a `datasets` data set, the name of its split). Raises DataError with the library's reason."""
    import datasets

    source = located.source
    try:
        data: Any = datasets.load_dataset(  # pyright: ignore[reportCallIssue]  its overloads want literal arguments
            located.hub,  # pyright: ignore[reportArgumentType]
            name=source.subset,
            split=source.split,  # pyright: ignore[reportArgumentType]
            data_dir=located.hub_folder,
            revision=source.revision,
            streaming=streaming,  # pyright: ignore[reportArgumentType]
        )
    except Exception as error:  # the library raises dozens of kinds, all of them about this name
        raise DataError(
            f"{located.key}: {source.path!r} is neither a file or folder here nor a data set the hub gave us "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        ) from error
    if source.split is not None:
        return data, source.split
    splits: Sequence[str] = list(data)
    if len(splits) > 1 and "train" not in splits:
        raise DataError(f"{located.key}.split: {source.path!r} has the splits {', '.join(splits)}; say which")
    split = "train" if "train" in splits else splits[0]
    return data[split], split
