"""Where the real models, tokenizers and data for tests lie; tests that need them skip elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def assets() -> Path:
    """The assets folder: TUNERY_ASSETS, or ../shared/assets beside the project. Skips the test where neither is."""
    root = Path(os.environ.get("TUNERY_ASSETS") or Path(__file__).resolve().parents[2] / "shared" / "assets")
    if not root.is_dir():
        pytest.skip(f"real assets not found at {root}; set TUNERY_ASSETS")
    return root
