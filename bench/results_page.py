"""Where measurements end up: one JSON file each in bench/results, and its own section of bench/RESULTS.md.

A section stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, so that one benchmark can be run again without
touching what the others wrote."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunery.files import write_json, write_text

HERE = Path(__file__).resolve().parent
HEAD = """# Results

What the scripts of this folder measured, written by them: `python -m bench.NAME` writes its section here and the
numbers to `results/NAME.json`. Each section says on which machine, with which versions and by which command. Ratios
compare contestants run in turns in one sitting; figures of different sections may come from different days.
"""


def write_section(name: str, markdown: str, page: Path = HERE / "RESULTS.md") -> None:
    """Put `markdown` (its heading included) between the markers of `name` on the page, at the end if it has none yet.
    Raises ValueError where the page has one of the two markers only, or they are not in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    section = f"{begin}\n{markdown.strip()}\n{end}"
    with _alone(page):
        text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
        counts = text.count(begin), text.count(end)
        if counts == (0, 0):
            write_text(page, f"{text.rstrip()}\n\n{section}\n")
            return
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if counts != (1, 1) or not closed:
            raise ValueError(f"{page}: the markers of section {name} do not stand once each, in order")
        write_text(page, before + section + after)


def save_result(name: str, values: dict[str, Any], folder: Path = HERE / "results") -> Path:
    """Write NAME.json: the values, with the machine, versions, command and date. Raises OSError."""
    path = folder / f"{name}.json"
    write_json(path, {**stamp(), **values})
    return path


def stamp() -> dict[str, Any]:
    """What every result says of itself."""
    from tunery.run_folder import versions

    program = f"python -m bench.{Path(sys.argv[0]).stem}"
    return {
        "machine": machine(),
        "versions": versions(),
        "command": " ".join([program, *map(shlex.quote, without_paths(sys.argv[1:]))]),
        "date": time.strftime("%Y-%m-%d"),
    }


def without_paths(arguments: Sequence[str]) -> list[str]:
    """A command's words as anyone would give them: with names for this machine's paths, and of other files and folders
    their own names alone."""
    places = {"--python": "PYTHON", "--llamafactory": "PYTHON", "--assets": "FOLDER"}
    words = list(arguments)
    for number, word in enumerate(words):
        name, joined, value = word.partition("=")
        if name in places and joined:
            words[number] = f"{name}={places[name]}"
        elif name in places and number + 1 < len(words):
            words[number + 1] = places[name]
        elif value.startswith("/"):
            words[number] = f"{name}={Path(value).name}"
        elif word.startswith("/"):
            words[number] = Path(word).name
    return words


def machine() -> str:
    """The processor and its cores, the memory, and the GPU where torch sees one."""
    parts = [f"{len(os.sched_getaffinity(0))} cores of {_processor()}"]
    parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def described(result: dict[str, Any]) -> str:
    """One Markdown paragraph: command, machine, versions and date of a saved result."""
    numbers = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"`{result['command']}` on {result['machine']}; {numbers}; {result['date']}."


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@contextmanager
def _alone(page: Path) -> Iterator[None]:
    """One writer at a time: two benchmarks that end together must not lose each other's section."""
    page.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(page.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
