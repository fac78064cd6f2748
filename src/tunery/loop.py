"""THE training loop. Everything it uses is built in setup.py; what a step is made of is decided in data/loader.py."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tunery import checkpoint
from tunery.checkpoint import check_room, save_interval
from tunery.data.prefetch import Prefetcher
from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import ModelError, TuneryError
from tunery.evaluate.held_out import held_out
from tunery.evaluate.showcase import Showcase
from tunery.export.verify import compare, probe_logits, probes
from tunery.fallback import REHEARSED, explained, rehearse
from tunery.files import make_readable
from tunery.flops import cost_of, flops_per_token, peak_flops
from tunery.frozen import begin_step, drop_frozen_states, keep_frozen_states, mark_frozen_states, skipped_flops
from tunery.guard import Gate
from tunery.job import Job, head_of
from tunery.models.score import load_with_head
from tunery.models.target import load_adapter
from tunery.observe import state_of
from tunery.read import beyond_context, read_data
from tunery.reference import drop_reference, keep_reference
from tunery.report import NullReport, Report
from tunery.resolve import resolve
from tunery.rollout.build import check_generator
from tunery.rollout.rollouts import Rollouts
from tunery.run_folder import (
    REFUSED,
    find_resume,
    is_finished,
    open_folder,
    same_data,
    write_config,
    write_data_report,
)
from tunery.schedule import factor, interval
from tunery.setup import Run, announce, base_name, check_disk, data_counts, save_tokenizer, set_up
from tunery.step import Taken, gradients, settle, total_weight, update


class Interrupted(TuneryError):
    """Ctrl-C: a checkpoint was saved, or a second one did not wait for that."""

    exit_code = 130


@dataclass
class Result:
    """What a run left behind. `metrics` is all_results.json; `step` the step whose weights are in `output`."""

    output: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    already_finished: bool = False


@explained()
def run_job(job: Job, console: Any = None) -> Result:
    """Train, evaluate and report, on this rank. Raises TuneryError; Interrupted after Ctrl-C."""
    output = Path(job.output)
    first_rank = int(os.environ.get("RANK", "0")) == 0
    check_generator(job)
    if first_rank:
        check_room(output, 0)
    read = read_data(job, console if first_rank else None)
    engine = Engine(job.model.dtype)
    try:
        job = resolve(job, engine, read)
        finished = is_finished(job, output)
        resume = None if finished else find_resume(job, output)
        if finished or (resume is not None and resume.parent.resolve() == output.resolve()):
            same_data(read.data, output)
        engine.barrier()  # before the first rank changes anything in the folder
        if finished:
            return Result(output, already_finished=True)
        open_folder(job, output, resume, engine.is_main)
        if engine.is_main:
            write_config(job, output)
            write_data_report(read.data, output)
            if console is not None:
                read.data.report.print(console)
        run = set_up(job, engine, read, resume)
        with _closing(run):
            keep_reference(run, console if engine.is_main else None)
            keep_frozen_states(run)
            if engine.is_main:
                check_disk(run)
            with _make_report(run, console) as report:
                return train(run, report)
    except BaseException:
        if engine.world > 1:
            engine.leave()  # those who wait for this rank would wait for long
        raise
    finally:
        if read.rewards is not None:
            read.rewards.close()


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    """Whatever happens in the block, what makes rollouts ends with it."""
    try:
        yield
    finally:
        if isinstance(run.loader, Rollouts):
            run.loader.close()


def train(run: Run, report: Report | NullReport) -> Result:
    """The steps of a run that is set up, and what it leaves behind. Raises what `run_job` does."""
    job, engine, model, total = run.job, run.engine, run.model, run.total_steps
    eval_every = interval(job.eval.every, total, default=run.loader.steps_per_epoch or total)
    save_every = save_interval(job.train.save_every, run.loader.steps_per_epoch, total)
    best: dict[str, Any] = run.state.get("best") or {"step": None, "loss": math.inf, "since": 0}
    gate = Gate(run.optimizer, engine.device)
    if engine.device.type in REHEARSED:
        rehearse(run, report, gate)
    showcase = Showcase(run, report)
    showcase.before()
    if run.start == 0:
        held_out(run, report, 0)
    model.train()
    if isinstance(run.loader, Rollouts):
        run.loader.log.say = report.say
    with _interruptible(run, report) as interrupt, Prefetcher(run.loader, total, engine.device) as ahead:
        step, under_way = run.start, deque[Taken]()
        while step < total:
            for group, peak in zip(run.optimizer.param_groups, run.peak_lrs, strict=True):
                group["lr"] = peak * factor(job.schedule, step, total)
            begin_step(run, step)
            work = ahead.step(step).recut(run.cut)
            weight, stop = total_weight(run, work, bool(interrupt))
            loss, metrics = gradients(run, report, step, work, weight)
            stop = stop or (engine.world == 1 and bool(interrupt))  # several ranks agree at their next step
            if isinstance(run.loader, Rollouts):
                metrics |= run.loader.take_figures()
            under_way.append(update(run, gate, step, work, weight, loss, metrics))
            step += 1
            evaluating = run.data.eval is not None and (step % eval_every == 0 or step == total)
            saving = step % save_every == 0 or step == total or stop
            while len(under_way) > (0 if evaluating or saving else engine.lag):
                settle(run, report, under_way.popleft())

            improved = False
            if evaluating:
                found = held_out(run, report, step)
                improved = found < best["loss"]
                best = {"step": step, "loss": found, "since": 0} if improved else {**best, "since": best["since"] + 1}
            enough = job.eval.patience is not None and best["since"] >= job.eval.patience
            if saving or enough or (improved and job.eval.best):
                _save(run, report, step, best)
            if stop:
                raise Interrupted(f"interrupted after step {step}/{total}; saved {run.output}/checkpoint-{step}. "
                                  "Run the same command again to go on")  # fmt: skip
            if enough:
                report.note(f"stopped early after step {step}: {best['since']} evaluations without a better loss")
                break
    return _finish(run, report, showcase, best, step)


# ---------------------------------------------------------------- around the steps


def _save(run: Run, report: Report | NullReport, step: int, best: dict[str, Any]) -> None:
    mark_frozen_states(run, step)
    if run.engine.is_main:
        state = {
            "step": step, "total_steps": run.total_steps, "best": best, "versions": run.versions,
            "frozen_states": run.policy.boundary is not None, "fallen_to": run.state.get("fallen_to"),
            "objective": state_of(run.objective),
        }  # fmt: skip
        keep_best = best["step"] if run.job.eval.best else None
        checkpoint.save(
            run.output, step, partial(_write, run, step), run.optimizer, state, keep=run.job.train.keep, best=keep_best
        )
    run.engine.barrier()
    report.mark()


def _write(run: Run, step: int, folder: Path) -> None:
    """What a checkpoint after `step` steps holds besides the optimizer's moments."""
    run.save_weights(folder)
    if isinstance(run.loader, Rollouts):
        run.loader.save(folder, step)


def _finish(run: Run, report: Report | NullReport, showcase: Showcase, best: dict[str, Any], step: int) -> Result:
    """Put the best weights in place, write what the run leaves behind, and show the difference it made."""
    final = step
    if run.job.eval.best and best["step"] not in (None, step):
        final = best["step"]
        folder = _checkpoint(run, final)
        run.adapter.load(run.model, folder)
        run.load_values(folder)
        report.note(f"the run ends with the weights of step {final}, where the evaluation loss was lowest")
    if run.engine.is_main:
        if not isinstance(run.data.train, TokenStore):  # of a stream they are known only now
            run.data.train.report.write_refused(run.output / REFUSED)
        run.adapter.finish(run.model, run.output, base_name(run.job.model), run.base_dtype)
        run.save_values(run.output)
        save_tokenizer(run, run.output)
        make_readable(run.output)
        if run.adapter.changes_base:
            _compare_saved(run, report)
    drop_frozen_states(run)
    drop_reference(run)
    run.engine.barrier()
    showcase.after()
    metrics = report.finish(model_step=final)
    return Result(run.output, metrics, final)


def _checkpoint(run: Run, step: int) -> Path:
    """The checkpoint of a step, which may be in the folder that the run was resumed from."""
    name = f"checkpoint-{step}"
    if run.resume is not None and not (run.output / name).is_dir():
        return run.resume.parent / name
    return run.output / name


def _compare_saved(run: Run, report: Report | NullReport) -> None:
    """The saved adapter on a fresh base must be the model in memory. Raises ModelError otherwise."""
    streams = probes(run.policy.causal.config.get_text_config().vocab_size)
    trained = probe_logits(run.model, streams)
    base = run.job.model.model_copy(update={"name": base_name(run.job.model)})
    start = load_with_head(head_of(run.job), base, run.engine.dtype, run.engine.device, seed=run.job.train.seed)
    fresh = load_adapter(start, run.output)
    check = compare(probe_logits(fresh, streams), trained, run.engine.dtype)
    if not check.passed:
        raise ModelError(
            f"{run.output}: the saved adapter on its base gives other logits than the trained model (relative error "
            f"{check.error:.2g}, allowed {check.tolerance:.2g}); the checkpoints are as they were trained"
        )
    report.note(f"the saved adapter was compared on the original base: relative logit error {check.error:.1g}")


@contextmanager
def _interruptible(run: Run, report: Report | NullReport) -> Iterator[list[int]]:
    """Ctrl-C (and a polite kill) fill the list instead of stopping in the middle of a step; a second one stops there:
    raises Interrupted, without a checkpoint. Both are answered at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(RuntimeError):  # it was in the middle of printing
            report.say("stopping when a step is whole, with a checkpoint; Ctrl-C again stops at once, without one")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except KeyboardInterrupt:
        raise Interrupted(_without_a_checkpoint(run)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_a_checkpoint(run: Run) -> str:
    """Whole checkpoints are renamed into place, so whatever is there can be gone on from."""
    saved = checkpoint.list_checkpoints(run.output)
    newest = saved[-1][1] if saved else run.resume
    said = "interrupted twice: stopped at once, and this step is lost. Run the same command again to "
    return said + (f"go on from {newest}" if newest else "begin anew: there is no checkpoint yet")


def _make_report(run: Run, console: Any) -> Report | NullReport:
    if not run.engine.is_main:
        return NullReport()
    job, train, cost = run.job, run.data.train, None
    if isinstance(train, TokenStore) and not isinstance(run.loader, Rollouts):
        lengths = train.lengths
        labelled = float(train.labelled.sum() / lengths.sum())
        cost = flops_per_token(
            cost_of(run.model), labelled=labelled, mean_length=float((lengths**2).sum() / lengths.sum())
        )
        cost *= 1 - skipped_flops(run) if run.policy.boundary is not None else 1
        if run.cut.share:  # of a token of the rows, some of which are computed once for several
            cost *= float(train.lengths_when_shared.sum() / lengths.sum())
    report = Report(
        run.output, job.report, total_steps=run.total_steps, total_epochs=run.loader.epoch_at(run.total_steps),
        start_step=run.start, log_every=job.train.log_every, flops_per_token=cost,
        peak_flops=peak_flops(run.engine.device, run.engine.dtype) * run.engine.world,
        job=job.model_dump(mode="json"), counts=data_counts(run), versions=run.versions, console=console,
    )  # fmt: skip
    for note in announce(run):
        report.note(note)
    warning = beyond_context(job, run.data)
    if warning is not None:
        report.warn(warning)
    return report
