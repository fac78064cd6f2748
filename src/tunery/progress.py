"""How a run looks while it goes on: a progress bar on a terminal, one plain line per log entry elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column


@dataclass(frozen=True, slots=True)
class Reading:
    """What is shown of one step. `speed` real tokens per second; `mfu` a share; `memory_bytes` as the device says;
    `left` seconds; `reward` where rewards are learned from; what is not known is None."""

    step: int
    loss: float
    lr: float
    speed: float
    mfu: float | None
    memory_bytes: int | None
    left: float
    reward: float | None = None

    def text(self) -> str:
        parts = [f"reward {self.reward:.4f}"] if self.reward is not None else []
        parts += [f"loss {self.loss:.4f}", f"lr {self.lr:.2e}", f"{human(self.speed)} tokens/s"]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.0%}")
        if self.memory_bytes is not None:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB")
        return "  ".join([*parts, f"{clock_text(self.left)} left"])


class Display:
    """Shows readings on `console`; `quiet` shows only what `say` and `warn` are given. On a terminal a bar that
    starts with the first reading; otherwise plain lines, for those readings that are logged."""

    def __init__(self, console: Console, total_steps: int, quiet: bool):
        self.console, self.total_steps, self.quiet = console, total_steps, quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def show(self, reading: Reading, logged: bool) -> None:
        if self.quiet:
            return
        if not self.console.is_terminal:
            if logged:
                self.console.print(
                    f"step {reading.step}/{self.total_steps}  {reading.text()}", soft_wrap=True, highlight=False
                )
            return
        bar = self._bar or self._start()
        bar.update(self._task, completed=reading.step, reading=reading.text())

    def _start(self) -> Progress:
        roomy = self.console.width >= 110  # a narrow terminal shows the numbers rather than the bar
        self._bar = Progress(
            *([TextColumn("train"), BarColumn(bar_width=24)] if roomy else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[reading]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=self.total_steps, reading="")
        self._bar.start()
        return self._bar

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(escape(text), soft_wrap=True, highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {escape(text)}", soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Take the bar away and leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock_text(seconds: float) -> str:
    """Seconds as H:MM:SS, the hours growing beyond a day: 90061 -> 25:01:01."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def human(value: float) -> str:
    """A number in three digits or so: 812, 3.4k, 12k, 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{value:.0f}"
