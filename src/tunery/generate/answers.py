"""The files of a run that answers rows: whose they are, going on after an interruption, and finishing."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import DataError
from tunery.files import json_line, write_json, write_text
from tunery.models.target import Target


@dataclass(frozen=True, slots=True)
class Files:
    """`out` the answers of all rows and `scores` what they are worth, both written at the end; until then the answers
    gather in `partial`, whose first line holds the settings they depend on."""

    out: Path
    scores: Path
    partial: Path

    @classmethod
    def at(cls, out: str | Path) -> Files:
        out = Path(out)
        if not out.name:  # "." and "/"
            raise DataError(f"{out}: is a folder; name a file to write, such as {out / 'predictions.jsonl'}")
        return cls(out, out.with_name(f"{out.stem}.scores.json"), out.with_name(out.name + ".partial"))

    # ------------------------------------------------------------ before the model loads

    def check_writable(self, data: Sequence[Path] = ()) -> None:
        """Raises DataError where `out` is a folder, one of the files of the `data`, or in a place that cannot be
        written; its folder is made."""
        if self.out.is_dir():
            raise DataError(f"{self.out}: is a folder; name a file to write, such as {self.out / 'predictions.jsonl'}")
        if self.out.exists() and any(self.out.samefile(file) for file in data if file.exists()):
            raise DataError(f"{self.out}: holds the rows to answer; name another file for the answers")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.out.parent, prefix=f".{self.out.name}."):
                pass
        except OSError as error:
            raise DataError(f"{self.out}: cannot be written: {error.strerror or error}; choose another file") from None

    def check_unclaimed(self, settings: Mapping[str, Any]) -> None:
        """Raises DataError where the files hold other answers than those of these settings (all there are, or those
        known so far)."""
        before = self._settings() if self.out.is_file() else None
        if before is not None and not _changed(before, settings):
            return
        if lines := self._lines():
            changed = _changed(_line(lines[0], self.partial, 1), settings)
            if changed:
                raise DataError(
                    f"{self.partial}: is of a run that was interrupted, under other settings ({changed}); give that "
                    "run's options to go on, choose another --out, or remove it"
                )
        elif self.out.exists():
            what = f"another run's answers ({_changed(before, settings)})" if before else "something else than answers"
            raise DataError(
                f"{self.out}: holds {what}; choose another --out, remove it, or give --no-resume to replace it"
            )

    def _settings(self) -> dict[str, Any] | None:
        """The settings of the finished run whose answers are in `out`."""
        found = self._finished().get("settings")
        return found if isinstance(found, dict) else None

    def _finished(self) -> dict[str, Any]:
        try:
            values = json.loads(self.scores.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    # ------------------------------------------------------------ going on, and the end

    def finished(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The scores of a finished run under the same settings."""
        values = self._finished()
        if not self.out.is_file() or values.pop("settings", None) != settings:
            return None
        values.pop("reasons", None)
        return values

    def begin(self, settings: dict[str, Any], resume: bool) -> dict[int, dict[str, Any]]:
        """The answers that an interrupted run of these settings left, by row. A last line that was cut off in the
        middle is taken away, so that the next one does not join it."""
        answers: dict[int, dict[str, Any]] = {}
        for number, line in enumerate((self._lines() if resume else [])[1:], 2):
            values = _line(line, self.partial, number)
            answers[values.pop("index")] = values
        kept = [settings, *({"index": i, **values} for i, values in answers.items())]
        write_text(self.partial, "".join(json_line(row) for row in kept))
        return answers

    def finish(self, rows: Iterable[Mapping[str, Any]], scores: Mapping[str, Any]) -> None:
        write_text(self.out, "".join(json_line(row) for row in rows))
        write_json(self.scores, scores)
        self.partial.unlink()

    def _lines(self) -> list[bytes]:
        return self.partial.read_bytes().split(b"\n")[:-1] if self.partial.is_file() else []


def same_name(name: str) -> str:
    """A target as it is compared: a folder with a slash at its end, as shells complete it, is the same folder."""
    return str(Path(name))


def weights_stamp(target: Target) -> str:
    """Tells one training of a folder from the next: names, sizes and times of its weight files."""
    folders = [folder for folder in (target.adapter, Path(target.base.name)) if folder is not None and folder.is_dir()]
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([seen, target.base.revision]).encode()).hexdigest()[:16]


def _changed(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What is different now, for a person; nothing where all is the same."""
    changed = [key for key in settings if before.get(key) != settings[key]]
    return ", ".join(f"{key} {before.get(key)!r} -> {settings[key]!r}" for key in changed)


def _line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: is damaged ({error}); remove the file to begin anew") from None
