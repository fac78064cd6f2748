"""Tokenised data on disk, named by the hash of everything that decides it. An entry is written beside its place and
renamed into it, so it is whole or absent; a damaged one is built again. With several ranks, rank 0 builds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunery.errors import DataError
from tunery.files import cache_folder

# How long a rank waits after rank 0's last sign of life, in seconds.
PATIENCE = 600.0


def rank() -> int:
    """This process's number among the ranks of a run: of torch.distributed where it is running, else $RANK, else 0."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK") or 0)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_digest(*modules: str) -> str:
    """SHA-256 of the source of tunery.data and of these modules: other code may give the same row other tokens."""
    digest = hashlib.sha256()
    paths = sorted(Path(__file__).parent.rglob("*.py"))
    paths += [Path(inspect.getfile(sys.modules[name])) for name in modules]
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry: a hash of plain values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class CacheEntry:
    """The folder of one key, and the marker that says that rank 0 is at work on it."""

    def __init__(self, key: str):
        self.folder = cache_folder() / "data" / key
        self.marker = self.folder.with_name(key + ".building")

    def exists(self) -> bool:
        return self.folder.is_dir()

    def claim(self) -> None:
        """Say that rank 0 is at work, and find out now, not after the work, whether the cache can be written. Raises
        DataError."""
        try:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.touch()
        except OSError as error:
            raise self._unwritable(error) from None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder that becomes the entry when the block ends well. Raises DataError where the cache cannot be
        written (no room, no permission)."""
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", dir=self.folder.parent))
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            yield temporary
            temporary.rename(self.folder)
        except OSError as error:
            if not self.exists():  # else another process was faster, with the same result, and may be reading it
                raise self._unwritable(error) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.folder.parent}: the cache cannot be written ({error.strerror or error}); set TUNERY_CACHE "
            "to a folder with room, or data.cache: false"
        )

    def beat(self) -> None:
        """Rank 0 is still at work."""
        with contextlib.suppress(OSError):
            self.marker.touch()

    def done(self) -> None:
        self.marker.unlink(missing_ok=True)

    def stamp(self) -> tuple[int, int] | None:
        """Tells an entry from the one that takes its place; None where there is none."""
        try:
            found = self.folder.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def wait(
        self,
        say: Callable[[str], None] = lambda line: None,
        patience: float = PATIENCE,
        damaged: tuple[int, int] | None = None,
    ) -> None:
        """Until rank 0 has made the entry, and one other than the `damaged` (by its stamp). Raises DataError after
        `patience` seconds without a sign of life."""
        started = time.time()
        said = False
        while self.stamp() in (None, damaged):
            try:
                alive = max(started, self.marker.stat().st_mtime)
            except OSError:
                alive = started
            if time.time() - alive > patience:
                raise DataError(
                    f"rank {rank()} waited {patience:.0f} s for rank 0 to tokenise the data into {self.folder}, and "
                    "saw no sign of it. Read rank 0's output; where the ranks do not share this folder, set "
                    "TUNERY_CACHE to one they share, or data.cache: false"
                )
            if not said and time.time() - started > 5:
                say(f"rank {rank()} waits for rank 0 to tokenise the data")
                said = True
            time.sleep(0.1)
