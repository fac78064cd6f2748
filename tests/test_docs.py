"""The documentation is true: its code runs, its files and options exist, its lists are those of the code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunery.config import kinds
from tunery.config_file import parse_yaml
from tunery.job import load_job

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("data", "templates", "plan", "troubleshooting", "extending", "objectives", "rewards")


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
def test_every_block_is_found(page):
    """What is not found is not tested below."""
    fences = re.findall(r"^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert 2 * len(list(blocks(page))) == len(fences) > 0


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


# ------------------------------------------------------------ what is shown is what the code takes


@pytest.mark.parametrize("page", PAGES)
def test_configuration_is_valid(page):
    """YAML without a title is part of a job."""
    for block in blocks(page):
        if block.language == "yaml" and not block.title:
            values = parse_yaml(block.text)
            values.setdefault("data", {}).setdefault("train", "rows.jsonl")
            load_job(values)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Every line `tunery COMMAND ... --option` in a shell block."""
    import typer

    from tunery.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in blocks(page):
        for line in block.text.splitlines() if block.language == "sh" else ():
            found = re.match(r"tunery (\S+)", line)
            if found:
                options = {name for parameter in commands[found[1]].params for name in parameter.opts}
                assert set(re.findall(r" (--[\w-]+)", line)) <= options, line


def test_links_between_pages_and_anchors_hold():
    generated, checked = {"config.md"}, 0
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
            path = DOCS / target if target else DOCS / f"{page}.md"
            assert path.exists() or target in generated, f"{page}.md: {target}"
            if anchor:
                checked += 1
                heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, anchor
    assert checked


# ------------------------------------------------------------ data.md


MIXED = "Pairs, thumbs and prompts"  # the section of data.md whose rows are in several formats


def test_rows_are_of_the_format_they_stand_under(tmp_path):
    from tunery.data.examples import read_examples
    from tunery.data.report import SourceReport
    from tunery.data.sources import Source, locate
    from tunery.types import Example

    text = (DOCS / "data.md").read_text(encoding="utf-8").splitlines()
    shown = set()
    for block in blocks("data"):
        if block.language != "jsonl":
            continue
        heading = next(line for line in reversed(text[: block.line]) if line.startswith("#")).lstrip("# ")
        for line in block.text.splitlines():
            (tmp_path / "row.jsonl").write_text(line + "\n", encoding="utf-8")
            report = SourceReport("data.train", "row.jsonl")
            ((_, _, example),) = read_examples(locate(Source(path=str(tmp_path / "row.jsonl"))), report)
            assert isinstance(example, Example), (line, example)
            assert report.format == heading or heading == MIXED, line
            assert report.unread == [], line
        shown.add(heading)
    assert shown == {*kinds("data.formats"), MIXED}


def test_the_columns_of_alpaca_are_all_there():
    from tunery.data.formats.alpaca import COLUMNS

    text = (DOCS / "data.md").read_text(encoding="utf-8").partition("### alpaca")[2].partition("### ")[0]
    for name, usual in COLUMNS.items():
        if name not in ("images", "videos", "audios"):
            assert f"`{name}`" in text and all(word in text for word in usual), name


def test_every_reason_for_refusing_a_row_is_explained():
    """RowError, RowRefused and Refused in tunery.data and what objectives are made of, by their first argument; a part
    in braces may be any word."""
    known, src = set(), ROOT / "src/tunery"
    for path in (*src.glob("data/**/*.py"), *src.glob("objectives/*.py"), src / "pairs.py", src / "thumbs.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id not in ("RowError", "RowRefused", "Refused"):
                continue
            match node.args[0]:
                case ast.Constant(value=str(reason)):
                    known.add(re.sub(r"(?<=leaves out )\w+", "*role*", reason))
                case ast.JoinedStr(values=parts):
                    known.add("".join(p.value if isinstance(p, ast.Constant) else "*role*" for p in parts))
    text = (
        (DOCS / "data.md").read_text(encoding="utf-8").partition("## Rows that cannot be used")[2].partition("\n## ")[0]
    )
    explained = set()
    for cell in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE):
        parts = cell.split(", ")
        head = parts[0].rpartition(" for ")[0]
        explained |= {f"{head} {part}" if part.startswith("for ") else part for part in parts}
    assert known <= explained, f"not in data.md: {sorted(known - explained)}"
    assert explained - {"reason", "---", "missing column", "wrong type"} <= known, f"gone: {sorted(explained - known)}"


# ------------------------------------------------------------ templates.md


def test_the_table_of_templates_is_that_of_the_folder():
    from tunery.data.template import named_templates

    text = (DOCS / "templates.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (\w+) \| (yes|no) \|", text, re.MULTILINE))
    assert sorted(table) == named_templates()
    for name, tools in table.items():
        source = (ROOT / f"src/tunery/data/templates/{name}.jinja").read_text(encoding="utf-8")
        assert (tools == "no") == (f"{name} has no form for tools" in source), name


# ------------------------------------------------------------ troubleshooting.md


def test_every_diagnosis_is_explained():
    """Each kind that diagnose.py and diagnose_rewards.py can find is a heading there."""
    texts = [(ROOT / f"src/tunery/{name}.py").read_text(encoding="utf-8") for name in ("diagnose", "diagnose_rewards")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    found = {ast.literal_eval(node.args[0]) for node in calls if node.func.id == "Diagnosis"}  # type: ignore[attr-defined]
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = {head.lower() for head in re.findall(r"^### (.*)$", text, re.MULTILINE)}
    assert found and found <= headings, found - headings
