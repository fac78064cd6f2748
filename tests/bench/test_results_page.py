"""The page of results: each section replaced by itself. Oracle: the text put there."""

from __future__ import annotations

import json

import pytest
from bench.results_page import HEAD, described, save_result, without_paths, write_section


def test_sections_are_added_and_replaced_alone(tmp_path):
    page = tmp_path / "RESULTS.md"
    write_section("first", "## First\n\n1", page)
    write_section("second", "## Second\n\n2", page)
    write_section("first", "## First\n\nanew\n", page)
    assert page.read_text() == (
        HEAD
        + "\n<!-- first:begin -->\n## First\n\nanew\n<!-- first:end -->\n"
        + "\n<!-- second:begin -->\n## Second\n\n2\n<!-- second:end -->\n"
    )


@pytest.mark.parametrize("text", ["<!-- a:begin -->\n", "<!-- a:end -->\n<!-- a:begin -->\n", "<!-- a:end -->\n" * 2])
def test_broken_markers_are_refused_and_nothing_is_lost(tmp_path, text):
    page = tmp_path / "RESULTS.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="markers of section a"):
        write_section("a", "x", page)
    assert page.read_text() == text


def test_a_result_says_where_it_is_from(tmp_path):
    result = json.loads(save_result("x", {"seconds": 1.5}, tmp_path).read_text())
    assert result["seconds"] == 1.5
    assert {"machine", "versions", "command", "date"} < set(result)
    assert result["machine"] in described(result) and result["versions"]["python"] in described(result)


def test_a_command_has_no_paths_of_this_machine():
    words = ["--python", "/a/python", "--assets=/a/b", "/rows/x.json", "model.name=/m/tiny", "lr=1e-4", "a/b.yaml"]
    assert without_paths(words) == [
        "--python", "PYTHON", "--assets=FOLDER", "x.json", "model.name=tiny", "lr=1e-4", "a/b.yaml",
    ]  # fmt: skip
