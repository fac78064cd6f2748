"""Oracle: the code. docs/config.md is generated from it and must not lag behind."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_what_the_code_says():
    made = runpy.run_path(str(ROOT / "scripts" / "make_config_reference.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == made, (
        "run: python scripts/make_config_reference.py"
    )
