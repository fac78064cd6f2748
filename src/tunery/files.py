"""Whole files or none: written beside, then renamed over."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """$TUNERY_CACHE, or ~/.cache/tunery."""
    return Path(os.environ.get("TUNERY_CACHE") or Path.home() / ".cache" / "tunery")


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic: a reader, or a crash at any moment, sees the old file or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private; a result is as readable as any other
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """One line of a .jsonl file. Always valid JSON: NaN and infinities become the strings "nan", "inf", "-inf",
    since leaving them out would hide them and a bare NaN breaks every strict reader."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def number(value: Any) -> float:
    """A number as `json_line` wrote it."""
    return float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def make_readable(folder: Path) -> None:
    """Make the files below a folder as readable as any other: safetensors leaves its own to their owner alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
