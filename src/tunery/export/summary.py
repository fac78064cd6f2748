"""What an export wrote and how it compares with what was trained, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WRITTEN = {
    "merged": ("the merged model", "the adapter on its base"),
    "model": ("the model", "the model it was made from"),
    "adapter": ("the adapter", "the adapter it was copied from"),
}


def summary(report: Mapping[str, Any]) -> list[str]:
    """Lines for a person, from what `export` returns."""
    what, source = WRITTEN[report["kind"]]
    stored = f" in {report['dtype']}" if report["dtype"] else ""
    size = f"{report['parameters']:,} parameters{stored}, {_bytes(report['bytes'])}"
    lines = [f"Wrote {what} to {report['out']} ({size}), and read it back."]
    scores = report["scores"]
    numbers = "values" if scores else "logits"
    lines += [f"  {numbers} compared with {source}: {_compared(report['written'], scores)}"]
    if "merge" in report:
        lines += [f"  of which by merging, before rounding: {_compared(report['merge'], scores)}"]
    if "effect" in report:
        moved = report["effect"]["error"]
        lines += [
            f"  the adapter moves its base's {numbers} by {moved:.2g} (relative)"
            if moved
            else f"  the adapter does not move its base's {numbers} at all: was it trained?"
        ]
    return lines


def _compared(check: Mapping[str, float], scores: bool) -> str:
    error = f"relative error {check['error']:.2g} (allowed {check['tolerance']:.2g})"
    return error if scores else f"{error}, {check['argmax']:.1%} of the likeliest tokens agree"


def _bytes(count: int) -> str:
    """A size in decimal units, as max_shard_size is given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
