"""Tokenised examples as flat arrays that can be memory-mapped: the form everything after the template reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tunery.data.share import shared_lengths
from tunery.errors import DataError
from tunery.types import Tokens

STORE_VERSION = 1
_META = "store.json"
_HASHED = 4096  # examples hashed at a time


class TokenStore:
    """E examples of one or more sequences each. The arrays, with S sequences and N tokens in all:

    `ids` int32 [N]; `weights` uint8 (all 0 or 1) or float32 [N]; `sequence_offsets` int64 [S + 1], into the tokens;
    `example_offsets` int64 [E + 1], into the sequences; `sequence_labelled` int64 [S]; `rows` int64 [E] and
    `file_index` int32 [E], into `files`: where an example came from; `source` int32 [E], the number of its entry in the
    data section; `token_extra` name -> [N] and `sequence_extra` name -> [S], what else the objective put into Tokens.

    `lengths` int64 [len(self)]: tokens of each example, over all its sequences.
    `index` int64 or None: a view of chosen examples in a chosen order, with repetition (see `select`)."""

    def __init__(self, arrays: dict[str, np.ndarray], files: Sequence[str], index: np.ndarray | None = None):
        self._arrays = arrays
        self.files = list(files)
        self.index = index
        self.ids = arrays["ids"]
        self.weights = arrays["weights"]
        self.sequence_offsets = arrays["sequence_offsets"]
        self.example_offsets = arrays["example_offsets"]
        self.sequence_labelled = arrays["sequence_labelled"]
        self.rows = arrays["rows"]
        self.file_index = arrays["file_index"]
        self.source = arrays["source"]
        self.token_extra = {name[6:]: array for name, array in arrays.items() if name.startswith("token.")}
        self.sequence_extra = {name[9:]: array for name, array in arrays.items() if name.startswith("sequence.")}
        self.lengths = self._of_examples(np.diff(self.sequence_offsets))

    def __len__(self) -> int:
        return len(self.rows) if self.index is None else len(self.index)

    def _at(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        number = number % len(self)
        return number if self.index is None else int(self.index[number])

    def _of_examples(self, per_sequence: np.ndarray) -> np.ndarray:
        """Sums of a per-sequence array over each example, int64 [len(self)]."""
        sums = np.concatenate([[0], np.cumsum(per_sequence, dtype=np.int64)])[self.example_offsets]
        sums = np.diff(sums)
        return sums if self.index is None else sums[self.index]

    @cached_property
    def labelled(self) -> np.ndarray:
        """Trained targets of each example (see Tokens.labelled): int64 [len(self)]."""
        return self._of_examples(self.sequence_labelled)

    @property
    def lengths_when_shared(self) -> np.ndarray:
        """`lengths`, what an example's sequences begin with alike (data/share.py) counted once: int64 [len(self)]."""
        return self._lengths_when_shared

    @cached_property
    def _lengths_when_shared(self) -> np.ndarray:
        shared = shared_lengths(self.ids, self.weights, self.sequence_offsets, self.example_offsets)
        saved = shared * (np.diff(self.example_offsets) - 1)
        return self.lengths - (saved if self.index is None else saved[self.index])

    @cached_property
    def truncated(self) -> np.ndarray:
        """Whether something of each example was cut to fit: bool [len(self)]."""
        flags = self.sequence_extra.get("truncated")
        if flags is None:
            return np.zeros(len(self), dtype=bool)
        return self._of_examples(flags) > 0

    @cached_property
    def sequence_counts(self) -> np.ndarray:
        """Sequences of each example: int64 [len(self)]."""
        counts = np.diff(self.example_offsets)
        return counts if self.index is None else counts[self.index]

    def sequence_lengths(self, number: int) -> np.ndarray:
        """Tokens of each sequence of an example: int64 [its sequences]."""
        at = self._at(number)
        return np.diff(self.sequence_offsets[self.example_offsets[at] : self.example_offsets[at + 1] + 1])

    def sequences(self, number: int) -> list[Tokens]:
        """An example's sequences; the arrays are views of the store, float32 weights excepted where it packs them."""
        at = self._at(number)
        result = []
        for s in range(int(self.example_offsets[at]), int(self.example_offsets[at + 1])):
            start, stop = int(self.sequence_offsets[s]), int(self.sequence_offsets[s + 1])
            extra: dict[str, Any] = {name: array[start:stop] for name, array in self.token_extra.items()}
            extra.update({name: array[s].item() for name, array in self.sequence_extra.items()})
            weights = self.weights[start:stop].astype(np.float32, copy=False)
            result.append(Tokens(self.ids[start:stop], weights, extra))
        return result

    def spans(self, number: int) -> list[tuple[int, int]]:
        """Where each sequence of an example begins and ends in the arrays of tokens."""
        at = self._at(number)
        bounds = self.sequence_offsets[self.example_offsets[at] : self.example_offsets[at + 1] + 1].tolist()
        return list(itertools.pairwise(bounds))

    def with_extra(self, name: str, array: np.ndarray) -> TokenStore:
        """The same view with one more Tokens.extra: `array` [N], beside `ids`."""
        return TokenStore({**self._arrays, f"token.{name}": array}, self.files, self.index)

    def origin(self, number: int) -> tuple[str, int]:
        """(file, 1-based row) that an example came from."""
        at = self._at(number)
        return self.files[int(self.file_index[at])], int(self.rows[at])

    def __iter__(self) -> Iterator[list[Tokens]]:
        return (self.sequences(number) for number in range(len(self)))

    def select(self, numbers: Sequence[int] | np.ndarray) -> TokenStore:
        """These examples in this order (repetition allowed), sharing the arrays."""
        numbers = np.asarray(numbers, dtype=np.int64)
        return TokenStore(self._arrays, self.files, numbers if self.index is None else self.index[numbers])

    def fingerprint(self) -> str:
        """A BLAKE2b hash, in hex, of what training sees: the examples' ids, weights and boundaries, and what the
        objective put beside them (labels, margins, a teacher's log-probs), in the order of this view. Where the rows
        came from and how they are stored does not matter."""
        beside = sorted([*self.token_extra, *self.sequence_extra])
        parts = [hashlib.blake2b(digest_size=16) for _ in range(4)]  # one stream a field: blocks leave no trace
        parts += [hashlib.blake2b(name.encode(), digest_size=16) for name in beside]
        index = np.arange(len(self), dtype=np.int64) if self.index is None else self.index
        for start in range(0, len(index), _HASHED):
            at = index[start : start + _HASHED]
            sequences = _ranges(self.example_offsets[at], self.example_offsets[at + 1])
            tokens = _ranges(self.sequence_offsets[sequences], self.sequence_offsets[sequences + 1])
            counts = self.example_offsets[at + 1] - self.example_offsets[at]
            lengths = self.sequence_offsets[sequences + 1] - self.sequence_offsets[sequences]
            weights = self.weights[tokens].astype(np.float32)
            extras = [
                (self.token_extra[name][tokens] if name in self.token_extra else self.sequence_extra[name][sequences])
                for name in beside
            ]
            fields = (counts, lengths, self.ids[tokens], weights, *(values.astype(np.float64) for values in extras))
            for part, array in zip(parts, fields, strict=True):
                part.update(np.ascontiguousarray(array).tobytes())
        return hashlib.blake2b(b"".join(part.digest() for part in parts), digest_size=16).hexdigest()

    def save(self, folder: str | Path) -> None:
        """One .npy a field and a store.json with their checksums, in a folder that must not hold a store yet.
        A view is written as what it shows."""
        if self.index is not None:
            return pack_store([Chunk.of(self, number) for number in range(len(self))], self.files).save(folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checksums = {}
        for name, array in self._arrays.items():
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
            checksums[name] = _checksum(folder / f"{name}.npy")
        meta = {"version": STORE_VERSION, "files": self.files, "checksums": checksums}
        (folder / _META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
        return None

    @classmethod
    def load(cls, folder: str | Path, mmap: bool = True) -> TokenStore:
        """The store that `save` wrote, memory-mapped. Raises DataError where a file is missing or damaged."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            if meta["version"] != STORE_VERSION:
                raise ValueError(f"version {meta['version']}, expected {STORE_VERSION}")
            arrays = {}
            for name, checksum in meta["checksums"].items():
                path = folder / f"{name}.npy"
                if _checksum(path) != checksum:
                    raise ValueError(f"{path.name} has changed since it was written")
                arrays[name] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False).view(np.ndarray)
            return cls(arrays, meta["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}: the token store cannot be read: {error}") from None


def _ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers of each range [start, stop), one range after the other: int64."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: finds torn writes and damage, at about a gigabyte a second."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


# ---------------------------------------------------------------- building


class Chunk:
    """Some consecutive examples as flat arrays: what a tokenising process hands back, and a store is joined from."""

    def __init__(self, examples: Sequence[Sequence[Tokens]], origins: Sequence[tuple[int, int, int]]):
        """`origins`: (source, file index, row) of each example."""
        sequences = [tokens for example in examples for tokens in example]
        weights = _flat([tokens.weights for tokens in sequences], np.float32)
        self.ids = _flat([tokens.ids for tokens in sequences], np.int32)
        self.weights = _compact(weights)
        self.sequence_lengths = np.array([len(tokens.ids) for tokens in sequences], dtype=np.int64)
        self.example_sequences = np.array([len(example) for example in examples], dtype=np.int64)
        self.labelled = _labelled(weights, self.sequence_lengths)
        self.origins = np.array(origins, dtype=np.int64).reshape(len(examples), 3)
        self.token_extra: dict[str, np.ndarray] = {}
        self.sequence_extra: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(name for tokens in sequences for name in tokens.extra):
            self._gather(name, [tokens.extra.get(name) for tokens in sequences])

    def _gather(self, name: str, values: list[Any]) -> None:
        """One extra of all the sequences; an absent one is 0 (False), as in `truncated`."""
        there = [value for value in values if value is not None]
        if there and all(isinstance(value, np.ndarray) and value.ndim == 1 for value in there):
            dtype = np.result_type(*there)
            lengths = self.sequence_lengths.tolist()
            arrays = [np.zeros(n, dtype) if value is None else value for value, n in zip(values, lengths, strict=True)]
            if any(len(array) != n for array, n in zip(arrays, lengths, strict=True)):
                raise ValueError(f"Tokens.extra[{name!r}]: an array must have one value for each token")
            self.token_extra[name] = _flat(arrays, dtype)
        elif there and all(isinstance(value, bool | int | float | np.generic) for value in there):
            zero = type(there[0])(0)
            self.sequence_extra[name] = np.array([zero if value is None else value for value in values])
        else:
            raise ValueError(f"Tokens.extra[{name!r}]: must be an array [T], a number, or true or false")

    @classmethod
    def of(cls, store: TokenStore, number: int) -> Chunk:
        """One example of a store."""
        at = store._at(number)
        origin = (int(store.source[at]), int(store.file_index[at]), int(store.rows[at]))
        return cls([store.sequences(number)], [origin])


def _flat(arrays: list[Any], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _compact(weights: np.ndarray) -> np.ndarray:
    """Weights as uint8 where all of them are 0 or 1."""
    return weights.astype(np.uint8) if ((weights == 0) | (weights == 1)).all() else weights


def _labelled(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Trained targets of each sequence: weights other than 0, after its first token. int64 [S]."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(weights != 0, dtype=np.int64)])
    first = np.minimum(starts[:-1] + 1, starts[1:])
    return before[starts[1:]] - before[first]


def _offsets(lengths: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(_flat(list(lengths), np.int64))]).astype(np.int64)


def _joined(parts: Sequence[tuple[dict[str, np.ndarray], int]]) -> dict[str, np.ndarray]:
    """Extras of several chunks, each beside how many values it must have; 0 where a chunk has none."""
    names = dict.fromkeys(name for extras, _ in parts for name in extras)
    result = {}
    for name in names:
        dtype = np.result_type(*[extras[name] for extras, _ in parts if name in extras])
        result[name] = _flat([extras.get(name, np.zeros(count, dtype)) for extras, count in parts], dtype)
    return result


def pack_store(chunks: Sequence[Chunk], files: Sequence[str]) -> TokenStore:
    """One store of all the chunks' examples, in order."""
    weights = [chunk.weights for chunk in chunks]
    dtype = np.uint8 if all(w.dtype == np.uint8 for w in weights) else np.float32
    origins = np.concatenate([chunk.origins for chunk in chunks]) if chunks else np.zeros((0, 3), np.int64)
    arrays = {
        "ids": _flat([chunk.ids for chunk in chunks], np.int32),
        "weights": _flat([w.astype(dtype, copy=False) for w in weights], dtype),
        "sequence_offsets": _offsets(chunk.sequence_lengths for chunk in chunks),
        "example_offsets": _offsets(chunk.example_sequences for chunk in chunks),
        "sequence_labelled": _flat([chunk.labelled for chunk in chunks], np.int64),
        "source": origins[:, 0].astype(np.int32),
        "file_index": origins[:, 1].astype(np.int32),
        "rows": origins[:, 2].copy(),
    }
    tokens = _joined([(chunk.token_extra, len(chunk.ids)) for chunk in chunks])
    sequences = _joined([(chunk.sequence_extra, len(chunk.sequence_lengths)) for chunk in chunks])
    arrays |= {f"token.{name}": array for name, array in tokens.items()}
    arrays |= {f"sequence.{name}": array for name, array in sequences.items()}
    return TokenStore(arrays, files)
