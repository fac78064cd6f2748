"""Where the stand-in says it runs, and what share of that memory is `free`."""

from __future__ import annotations

from types import SimpleNamespace

current_platform = SimpleNamespace(device_type="cpu", free=0.9)
