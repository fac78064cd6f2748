"""The documentation is true: its code runs, its files and options exist, its lists are those of the code."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunery.config import kinds, parse_yaml
from tunery.job import load_job

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("data", "templates", "troubleshooting", "extending")


@dataclass
class Block:
    """A fenced block of code. `title` is the file it is to be, if any; `line` where it stands."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], found[2], found[3], text[: found.start()].count("\n") + 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder that Python imports from, as a reader's would be with PYTHONPATH set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "acme":
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, folder):
    """Blocks with a title are written to that file; Python without one runs, in order, in one namespace."""
    namespace: dict[str, object] = {}
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
            exec(compile(code, str(DOCS / f"{page}.md"), "exec"), namespace)
