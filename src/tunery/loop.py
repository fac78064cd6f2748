"""THE training loop. Everything it uses is built in setup.py; what a step is made of is decided in data/loader.py."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunery import checkpoint, guard
from tunery.checkpoint import check_room
from tunery.data.loader import evaluation_streams
from tunery.data.prefetch import Prefetcher
from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import ModelError, NonFiniteError, TuneryError
from tunery.evaluate.loss import evaluate
from tunery.evaluate.showcase import Showcase
from tunery.export.verify import compare, probe_logits, probes
from tunery.files import make_readable
from tunery.flops import cost_of, flops_per_token, peak_flops
from tunery.job import Job
from tunery.models.load import load_model
from tunery.models.target import load_adapter
from tunery.report import NullReport, Report
from tunery.run_folder import (
    REFUSED,
    find_resume,
    is_finished,
    open_folder,
    same_data,
    write_config,
    write_data_report,
)
from tunery.schedule import factor
from tunery.setup import (
    Run,
    announce,
    base_name,
    beyond_context,
    check_disk,
    data_counts,
    interval,
    read_data,
    resolve,
    save_interval,
    save_tokenizer,
    set_up,
)


class Interrupted(TuneryError):
    """Ctrl-C: a checkpoint was saved."""

    exit_code = 130


@dataclass
class Result:
    """What a run left behind. `metrics` is all_results.json; `step` the step whose weights are in `output`."""

    output: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    already_finished: bool = False


def run_job(job: Job, console: Any = None) -> Result:
    """Train, evaluate and report, on this rank. Raises TuneryError; Interrupted after Ctrl-C."""
    output = Path(job.output)
    first_rank = int(os.environ.get("RANK", "0")) == 0
    if first_rank:
        check_room(output, 0)
    read = read_data(job, console if first_rank else None)
    engine = Engine(job.model.dtype)
    try:
        job = resolve(job, engine)
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
        if engine.is_main:
            check_disk(run)
        with _make_report(run, console) as report:
            return train(run, report)
    finally:
        engine.close()


def train(run: Run, report: Report | NullReport) -> Result:
    """The steps of a run that is set up, and what it leaves behind. Raises what `run_job` does."""
    job, engine, model, total = run.job, run.engine, run.model, run.total_steps
    eval_every = interval(job.eval.every, total, default=run.loader.steps_per_epoch or total)
    save_every = save_interval(job, run.loader, total)
    best: dict[str, Any] = run.state.get("best") or {"step": None, "loss": math.inf, "since": 0}
    showcase = Showcase(run, report)
    showcase.before()
    if run.start == 0:
        _evaluate(run, report, 0)
    model.train()
    with _interruptible() as interrupt, Prefetcher(run.loader, total, engine.device) as ahead:
        step = run.start
        while step < total:
            for group, peak in zip(run.optimizer.param_groups, run.peak_lrs, strict=True):
                group["lr"] = peak * factor(job.schedule, step, total)
            engine.seed(job.train.seed, step)
            work = ahead.step(step)
            micro = [batch.to(engine.device) for batch in work.micro]

            weight, stop = _total(run, micro, bool(interrupt))
            loss, norm, metrics = _reduce(run, _forward_backward(run, micro, weight))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                _fail(run, step, micro)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            step += 1
            report.step(
                step, loss=loss, weight=weight, lr=run.optimizer.param_groups[0]["lr"], grad_norm=norm,
                tokens=work.tokens, examples=work.examples, epoch=run.loader.epoch_at(step),
                metrics=metrics, memory_bytes=engine.memory(),
            )  # fmt: skip

            improved = False
            if run.data.eval is not None and (step % eval_every == 0 or step == total):
                loss = _evaluate(run, report, step)
                improved = loss < best["loss"]
                best = {"step": step, "loss": loss, "since": 0} if improved else {**best, "since": best["since"] + 1}
            enough = job.eval.patience is not None and best["since"] >= job.eval.patience
            if step % save_every == 0 or step == total or stop or enough or (improved and job.eval.best):
                _save(run, report, step, best)
            if stop:
                raise Interrupted(f"interrupted after step {step}/{total}; saved {run.output}/checkpoint-{step}. "
                                  "Run the same command again to go on")  # fmt: skip
            if enough:
                report.note(f"stopped early after step {step}: {best['since']} evaluations without a better loss")
                break
    return _finish(run, report, showcase, best, step)


# ---------------------------------------------------------------- one step


def _total(run: Run, micro: list[Any], interrupted: bool) -> tuple[float, bool]:
    """The whole step's weight over all ranks, known from the data before any forward; and whether to stop after it."""
    mine = sum((run.objective.weight(batch) for batch in micro), torch.zeros((), device=run.engine.device))
    weight, stop = run.engine.sum(torch.stack([mine, torch.tensor(float(interrupted), device=mine.device)])).tolist()
    return weight, stop > 0


def _forward_backward(run: Run, micro: list[Any], weight: float) -> dict[str, tuple[Any, Any]]:
    """Gradients of (sum of the losses) / weight, whatever the cut. A step with nothing labelled gives zero."""
    sums: dict[str, tuple[Any, Any]] = {}
    for batch in micro:
        loss = run.objective.loss(run.policy, batch)
        (loss.sum / max(weight, 1e-30)).backward()
        for name, (value, share) in loss.metrics.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + share)
    return sums


def _reduce(run: Run, metrics: dict[str, Any]) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Gradients summed over ranks and clipped; the step's loss, gradient norm and metrics as plain numbers."""
    run.engine.sum_gradients(run.parameters)
    limit = run.job.train.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, limit if limit is not None else math.inf)
    totals = run.engine.sum_metrics(metrics)
    value, share = totals.get("loss", (0.0, 0.0))
    return value / share if share else 0.0, float(norm), totals


def _fail(run: Run, step: int, micro: list[Any]) -> None:
    """Stop before the update: say what was not finite and keep what replays it."""
    run.optimizer.zero_grad(set_to_none=True)
    seed = run.job.train.seed
    findings = guard.investigate(run.model, run.objective, run.policy, micro, lambda: run.engine.seed(seed, step))
    everyone = run.engine.gather((findings, [guard.as_dict(batch) for batch in micro]))
    findings = [finding for found, _ in everyone for finding in found]
    origins = {row: origin(run, row) for finding in findings for row in finding.rows}
    folder = run.output / f"failure-step-{step + 1}"
    if run.engine.is_main:
        guard.keep_failure(folder, step, everyone, origins)
        run.save_weights(folder)
    raise NonFiniteError(guard.explain(step + 1, findings, origins, run.output))


def origin(run: Run, row: int) -> str:
    """file:row of a training example, for messages."""
    if isinstance(run.data.train, TokenStore):
        file, number = run.data.train.origin(row)
        return f"{file}:{number}"
    return f"streamed example {row + 1}"


# ---------------------------------------------------------------- around the steps


def _evaluate(run: Run, report: Report | NullReport, step: int) -> float:
    """Held-out loss by tokens over all ranks; infinity (never the best) without held-out rows."""
    if run.data.eval is None:
        return math.inf
    streams = evaluation_streams(run.data.eval, run.cut)
    metrics = evaluate(run.objective, run.policy, run.model, streams, run.engine)
    loss = metrics.pop("loss")
    report.evaluation(step, loss, metrics)
    return loss


def _save(run: Run, report: Report | NullReport, step: int, best: dict[str, Any]) -> None:
    if run.engine.is_main:
        state = {"step": step, "total_steps": run.total_steps, "best": best, "versions": run.versions}
        keep_best = best["step"] if run.job.eval.best else None
        checkpoint.save(
            run.output, step, run.save_weights, run.optimizer, state, keep=run.job.train.keep, best=keep_best
        )
    run.engine.barrier()
    report.mark()


def _finish(run: Run, report: Report | NullReport, showcase: Showcase, best: dict[str, Any], step: int) -> Result:
    """Put the best weights in place, write what the run leaves behind, and show the difference it made."""
    final = step
    if run.job.eval.best and best["step"] not in (None, step):
        final = best["step"]
        run.adapter.load(run.model, run.output / f"checkpoint-{final}")
        report.note(f"the run ends with the weights of step {final}, where the evaluation loss was lowest")
    if run.engine.is_main:
        if not isinstance(run.data.train, TokenStore):  # of a stream they are known only now
            run.data.train.report.write_refused(run.output / REFUSED)
        run.adapter.finish(run.model, run.output, base_name(run.job.model), run.base_dtype)
        save_tokenizer(run, run.output)
        make_readable(run.output)
        if run.adapter.changes_base:
            _compare_saved(run, report)
    run.engine.barrier()
    showcase.after()
    metrics = report.finish(model_step=final)
    return Result(run.output, metrics, final)


def _compare_saved(run: Run, report: Report | NullReport) -> None:
    """The saved adapter on a fresh base must be the model in memory. Raises ModelError otherwise."""
    streams = probes(run.policy.causal.config.get_text_config().vocab_size)
    trained = probe_logits(run.model, streams)
    base = run.job.model.model_copy(update={"name": base_name(run.job.model)})
    fresh = load_adapter(load_model(base, run.engine.dtype, run.engine.device), run.output)
    check = compare(probe_logits(fresh, streams), trained, run.engine.dtype)
    if not check.passed:
        raise ModelError(
            f"{run.output}: the saved adapter on its base gives other logits than the trained model (relative error "
            f"{check.error:.2g}, allowed {check.tolerance:.2g}); the checkpoints are as they were trained"
        )
    report.note(f"the saved adapter was compared on the original base: relative logit error {check.error:.1g}")


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C (and a polite kill) fill the list instead of stopping in the middle of a step; a second one stops."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _make_report(run: Run, console: Any) -> Report | NullReport:
    if not run.engine.is_main:
        return NullReport()
    job, train, cost = run.job, run.data.train, None
    if isinstance(train, TokenStore):
        lengths = train.lengths
        labelled = float(train.labelled.sum() / lengths.sum())
        cost = flops_per_token(
            cost_of(run.model), labelled=labelled, mean_length=float((lengths**2).sum() / lengths.sum())
        )
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
