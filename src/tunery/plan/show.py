"""A plan as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunery.plan.bill import Plan

COLOURS = {
    "weights": "blue", "optimizer": "magenta", "gradients": "cyan", "activations": "green", "logits": "yellow",
    "temporaries": "bright_black", "overhead": "white",
}  # fmt: skip

TIMES = {"estimate": "an estimate; times may be off by a factor of two", "corrected": "by real steps"}


@dataclass(frozen=True)
class Part:
    """A piece of the memory bar: `share` of the device's memory, above 1 in sum where the run does not fit."""

    name: str
    bytes: int
    share: float


def bar_parts(plan: Plan) -> list[Part]:
    """The memory bar, part by part and then what is free, for whoever draws it."""
    parts = [Part(name, size, size / plan.device_memory) for name, size in plan.memory.parts().items()]
    free = plan.device_memory - plan.memory.total
    return [*parts, Part("free", free, free / plan.device_memory)] if free > 0 else parts


def bar(plan: Plan, width: int = 60) -> Any:
    """The memory bar as rich text, `width` characters for the whole device (longer where the run does not fit)."""
    from rich.text import Text

    text, filled, exact = Text(), 0, 0.0
    for part in bar_parts(plan):
        exact += part.share * width
        count = round(exact) - filled
        filled += count
        text.append(("·" if part.name == "free" else "█") * count, COLOURS.get(part.name, "dim"))
    return text


def size(bytes: float) -> str:
    """A number of bytes for a person: 512 MB, 16.1 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if bytes >= scale:
            return f"{bytes / scale:.3g} {unit}" if bytes < 100 * scale else f"{bytes / scale:.0f} {unit}"
    return f"{bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Seconds for a person: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def print_plan(plan: Plan, console: Any) -> None:
    """The whole plan on a rich console."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _lines(plan):
        table.add_row(name, value)
    console.print(table)
    console.print()
    console.print(bar(plan))
    legend = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for part in bar_parts(plan):
        if part.bytes:
            colour = COLOURS.get(part.name, "dim")
            legend.add_row(f"[{colour}]{'·' if part.name == 'free' else '█'}[/] {part.name}", size(part.bytes))
    console.print(legend)
    if plan.ladder:
        console.print()
        console.print(_ladder(plan))
    for note in plan.notes:
        console.print(f"note: {note}")


def _ladder(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title="what makes it fit", title_justify="left")
    for name in ("change", "memory", "", "time"):
        table.add_column(name, justify="left" if name in ("change", "") else "right")
    for change in plan.ladder:
        verdict = "[green]fits[/]" if change.fits else "[red]does not fit[/]"
        later = "" if change.settings is not None else " [dim](not yet in this version)[/]"
        slower = "" if change.slower is None else f"x {change.slower:.2f}"
        table.add_row(change.what + later, size(change.memory), verdict, slower)
    return table


def _lines(plan: Plan) -> list[tuple[str, str]]:
    verdict = "fits" if plan.fits else "does not fit"
    ranks = f" x {plan.ranks}" if plan.ranks > 1 else ""
    step = duration(plan.seconds_per_step)
    lines = [
        ("model", f"{plan.model}: {plan.parameters:,} parameters"),
        ("trains", f"{plan.trainable:,} ({plan.trainable / plan.parameters:.2%}, {plan.adapter}), in {plan.dtype}"),
        ("device", f"{plan.device}{ranks}, {size(plan.device_memory)} of memory"),
        ("memory", f"{size(plan.memory.total)}: {verdict}"),
        ("cut", f"micro-batches of up to {plan.micro_tokens:,} tokens, checkpointing {plan.checkpointing}"),
        (
            "arithmetic",
            f"{plan.flops_per_token / 1e9:.3g} GFLOP a token ({plan.executed_flops_per_token / 1e9:.3g} executed)",
        ),
        ("speed", f"about {plan.tokens_per_second:,.0f} tokens/s, {step} a step ({TIMES[plan.times]})"),
    ]
    if plan.steps is not None and plan.tokens is not None and plan.seconds is not None:
        lines.append(("run", f"{plan.steps:,} steps, {plan.tokens:,} tokens: about {duration(plan.seconds)}"))
    lines.append(("disk", f"{size(plan.disk)} for checkpoints and the result"))
    return lines
