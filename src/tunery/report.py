"""A run's numbers on their way to people: the progress bar, trainer_log.jsonl, trackers, and the files at the end.

Called with plain numbers by one process of a run; the others hold a NullReport. The files have the names and keys
that users of Hugging Face's Trainer and of LLaMA-Factory have scripts for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunery.diagnose import DataCounts, Diagnosis, diagnose
from tunery.diagnose_rewards import diagnose_rewards
from tunery.history import Evaluation, LineFile, Step, read_history, tokens_per_second, window_means
from tunery.progress import Display, Reading, clock_text
from tunery.results import Facts, Outcome
from tunery.run_report import comparison_tables, write_run_folder
from tunery.trackers import Tracker, make_trackers

if TYPE_CHECKING:
    from tunery.job import ReportConfig

LOOKS = 50  # times per run that the whole history is diagnosed, so that looking stays cheap however long the run is


class Report:
    """Records a run in its folder `output`.

    `total_steps` and `total_epochs` are of the whole run, `start_step` the steps done before (resuming: what was
    recorded after it is cut away, and the curve and the clock go on from there). `log_every`: steps per line of the
    log. `flops_per_token` (useful FLOPs per real token) and `peak_flops` (FLOP/s of all devices together), see
    flops.py, give the MFU; without both none is shown. `job` (the resolved configuration), `counts` and `versions`
    are for report.md and the trackers. `console` is standard error unless given; `quiet` leaves only warnings and
    results. Close it, or use it as a context manager, so that the terminal is left in order."""

    def __init__(
        self,
        output: Path,
        config: ReportConfig,
        *,
        total_steps: int,
        total_epochs: float,
        start_step: int = 0,
        log_every: int = 5,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        job: Mapping[str, Any] | None = None,
        counts: DataCounts | None = None,
        versions: Mapping[str, str] | None = None,
        console: Console | None = None,
        quiet: bool = False,
        trackers: Sequence[Tracker] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.output, self.total_steps, self.total_epochs = Path(output), total_steps, total_epochs
        self.log_every, self.flops_per_token, self.peak_flops = log_every, flops_per_token, peak_flops
        self.job, self.counts, self.versions = dict(job or {}), counts, dict(versions or {})
        self.trackers = make_trackers(config, self.output, start_step, self.job) if trackers is None else list(trackers)
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.outcome: Outcome | None = None
        self.display = Display(console or Console(stderr=True), total_steps, quiet)
        self._steps_file = LineFile(self.output / "steps.jsonl", "step", start_step)
        self._log_file = LineFile(self.output / "trainer_log.jsonl", "current_steps", start_step)
        self.history = read_history(self._steps_file.lines_kept)
        self._tokens = sum(step.tokens for step in self.history.steps)
        logged = max((line["current_steps"] for line in self._log_file.lines_kept if "loss" in line), default=0)
        self._unlogged = [step for step in self.history.steps if step.step > logged]
        self._diagnoses: list[Diagnosis] = []
        self._said: set[str] = set()
        self._next_look = start_step
        self._clock = clock
        self._elapsed_before = self.history.elapsed
        self._began = self._last = clock()
        self._look()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def elapsed(self) -> float:
        """Seconds the run has taken, those before a resume included."""
        return self._elapsed_before + self._clock() - self._began

    def mfu(self, speed: float) -> float | None:
        """Model FLOPs utilisation at `speed` real tokens per second: useful FLOP/s over what the devices could do."""
        if not self.flops_per_token or not self.peak_flops:
            return None
        return speed * self.flops_per_token / self.peak_flops

    # ------------------------------------------------------------ while training

    def mark(self) -> None:
        """What passed since the last step was not training (saving, say): leave it out of tokens per second."""
        self._last = self._clock()

    def step(
        self,
        step: int,
        *,
        loss: float,
        weight: float,
        lr: float,
        grad_norm: float | None,
        tokens: int,
        examples: int,
        epoch: float,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Record optimizer step `step` (1-based) in plain numbers. `loss` is the step's exact mean over `weight`
        (labelled tokens, or pairs); `tokens` real tokens and `examples` rows over all ranks; `metrics` name ->
        (sum, weight). Every `log_every` steps, and after the last, a line goes to the log and the trackers."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        pairs = {name: pair for name, pair in (metrics or {}).items() if name != "loss"}
        record = Step(step, loss, weight, lr, grad_norm, tokens, examples, epoch, seconds, self.elapsed, pairs)
        self.history.steps.append(record)
        self._steps_file.add(asdict(record))
        self._tokens += tokens
        self._unlogged.append(record)
        window = self._unlogged
        logged = step % self.log_every == 0 or step >= self.total_steps
        if logged:
            self.log(memory_bytes)
        speed = tokens_per_second(window)
        means = window_means(window)
        reading = Reading(
            step, means["loss"], lr, speed, self.mfu(speed), memory_bytes, self._left(step), means.get("reward")
        )
        self.display.show(reading, logged)
        if logged and step >= self._next_look:
            self._look()

    def log(self, memory_bytes: int | None = None) -> None:
        """Append the steps since the last line to trainer_log.jsonl, as one line; nothing if there are none."""
        if not self._unlogged:
            return
        window, self._unlogged = self._unlogged, []
        last, means, speed = window[-1], window_means(window), tokens_per_second(window)
        self._log_file.add(
            {
                **self._progress(last.step),
                **means,
                "lr": last.lr,
                "grad_norm": last.grad_norm,
                "epoch": round(last.epoch, 4),
                "throughput": round(speed, 2),
                "total_tokens": self._tokens,
            }
        )
        numbers: dict[str, float | None] = {
            **means,
            "learning_rate": last.lr,
            "grad_norm": last.grad_norm,
            "epoch": last.epoch,
            "tokens_per_second": speed,
            "total_tokens": self._tokens,
            "mfu": self.mfu(speed),
            "memory_bytes": memory_bytes,
        }
        self._track({f"train/{name}": value for name, value in numbers.items() if value is not None}, last.step)

    def evaluation(self, step: int, eval_loss: float, metrics: Mapping[str, float] | None = None) -> None:
        """Record an evaluation after `step` (0: before training): the mean held-out loss over labelled tokens (of a run
        that is judged by rewards, the held-out reward with its sign turned), and further numbers. A second one at the
        same step takes the place of the first."""
        metrics = dict(metrics or {})
        if self.history.evaluation_at(step) is not None:
            self.history.evaluations = [known for known in self.history.evaluations if known.step != step]
            self._steps_file.remove(step, having="eval_loss")
            self._log_file.remove(step, having="eval_loss")
        epoch = self.history.steps[-1].epoch if self.history.steps else 0.0
        record = Evaluation(step, eval_loss, epoch, self.elapsed, metrics)
        self.history.evaluations.append(record)
        self._steps_file.add(asdict(record))
        self._log_file.add({**self._progress(step), "eval_loss": eval_loss, **metrics, "epoch": round(epoch, 4)})
        self._track({"eval/loss": eval_loss} | {f"eval/{name}": value for name, value in metrics.items()}, step)
        rewarded = f"held-out reward {metrics['reward']:.4f}" if "reward" in metrics else ""
        self.display.say(f"step {step}/{self.total_steps}  {rewarded or f'evaluation loss {eval_loss:.4f}'}")
        self._look()
        self.mark()

    def warn(self, text: str) -> None:
        """Tell the user now, and again in report.md."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.display.warn(text)

    def note(self, text: str) -> None:
        """Tell the user something that is no trouble, now and in report.md."""
        if text not in self.notes:
            self.notes.append(text)
            self.display.say(text)

    def say(self, text: str) -> None:
        """Tell the user now, and nowhere else."""
        self.display.say(text)

    def before_after(
        self, before: Mapping[str, float], after: Mapping[str, float], samples: Sequence[Mapping[str, str]]
    ) -> None:
        """Held-out scores by generation, before and after training, and rows {prompt, label, before, after}: printed
        as tables now, and kept for report.md and all_results.json."""
        self.outcome = Outcome(dict(before), dict(after), [dict(sample) for sample in samples])
        self.display.close()
        for table in comparison_tables(self.outcome):
            self.display.console.print(table)

    # ------------------------------------------------------------ at the end

    def finish(
        self,
        train_metrics: Mapping[str, Any] | None = None,
        eval_metrics: Mapping[str, Any] | None = None,
        model_step: int | None = None,
    ) -> dict[str, Any]:
        """Write train_results.json, eval_results.json, all_results.json, trainer_state.json, the plots and
        report.md; give back all results. `model_step`: the step whose weights the run ends with (default: the last),
        which eval_results.json tells of. The two mappings are added to the results of their kind."""
        self.log()
        self._look()
        self.close()
        facts = Facts(
            history=self.history,
            total_steps=self.total_steps,
            total_epochs=self.total_epochs,
            log_every=self.log_every,
            elapsed=self.elapsed,
            model_step=self.history.last_step if model_step is None else model_step,
            flops=self._tokens * self.flops_per_token if self.flops_per_token else None,
            mfu=self.mfu(tokens_per_second(self.history.steps)),
            counts=self.counts,
            diagnoses=self._diagnoses,
            warnings=self.warnings,
            notes=self.notes,
            outcome=self.outcome,
            job=self.job,
            versions=self.versions,
        )
        everything = write_run_folder(self.output, facts, train_metrics or {}, eval_metrics or {})
        self._track({name: value for name, value in everything.items() if _is_number(value)}, self.history.last_step)
        self._each_tracker(lambda tracker: tracker.finish())
        return everything

    def close(self) -> None:
        """Close the bar and the log files. Nothing more can be recorded."""
        self.display.close()
        self._steps_file.close()
        self._log_file.close()

    # ------------------------------------------------------------ inside

    def _left(self, step: int) -> float:
        """Seconds until the last step, at the whole run's pace (evaluation and saving included)."""
        return self.elapsed / step * (self.total_steps - step) if step > 0 else 0.0

    def _progress(self, step: int) -> dict[str, Any]:
        """The keys that every line of trainer_log.jsonl has."""
        return {
            "current_steps": step,
            "total_steps": self.total_steps,
            "percentage": round(100 * step / self.total_steps, 2) if self.total_steps else 100.0,
            "elapsed_time": clock_text(self.elapsed),
            "remaining_time": clock_text(self._left(step)),
        }

    def _look(self) -> None:
        """Diagnose, and say what is new."""
        self._next_look = self.history.last_step + max(1, self.total_steps // LOOKS)
        rewarded = self.counts is not None and self.counts.prompts
        self._diagnoses = (
            diagnose_rewards(self.history, self.counts)
            if rewarded
            else diagnose(self.history, self.counts, total_steps=self.total_steps)
        )
        for diagnosis in self._diagnoses:
            if diagnosis.kind not in self._said:
                self._said.add(diagnosis.kind)
                (self.display.warn if diagnosis.level == "warning" else self.display.say)(diagnosis.message)

    def _track(self, numbers: Mapping[str, float], step: int) -> None:
        self._each_tracker(lambda tracker: tracker.log(numbers, step))

    def _each_tracker(self, call: Callable[[Tracker], None]) -> None:
        """A tracker that fails (its server is gone, say) is given up with a warning: the run is worth more, and
        trainer_log.jsonl has the numbers."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a foreign library raises
                self.trackers.remove(tracker)
                reason = f"{type(error).__name__}: {error}"
                self.warn(f"{type(tracker).__name__} failed and gets no more numbers; the run goes on ({reason})")


class NullReport:
    """Records nothing: what the processes of a run other than the first hold."""

    def __enter__(self) -> NullReport:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def mark(self) -> None: ...

    def step(self, step: int, **numbers: Any) -> None: ...

    def log(self, memory_bytes: int | None = None) -> None: ...

    def evaluation(self, step: int, eval_loss: float, metrics: Mapping[str, float] | None = None) -> None: ...

    def warn(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def before_after(
        self, before: Mapping[str, float], after: Mapping[str, float], samples: Sequence[Mapping[str, str]]
    ) -> None: ...

    def finish(
        self,
        train_metrics: Mapping[str, Any] | None = None,
        eval_metrics: Mapping[str, Any] | None = None,
        model_step: int | None = None,
    ) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
