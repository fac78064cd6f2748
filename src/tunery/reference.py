"""The reference of preference and reinforcement objectives: the policy as it stood when training began, never silently
the base. It is the policy's own model and code with the weights of the start put back, so it is exact for every
adapter, from the base or from one that was trained before (model.init_from), whole weights or a few.

Objectives that say `reference = True` get it in one of two ways (`objective.reference`):

- live: a copy of what trains is kept, and each of the policy's forwards has one of the starting weights beside it;
- cached: log p of every trained token of the training and evaluation rows, by one pass before the first step, in files
  of the run folder, from where they come with the batch (Batch.extra). It costs what the first epoch's live forwards
  would, saves those of all later epochs and evaluations, and no copy of the weights is kept. So it is the default for
  rows in memory; only rows that the run comes to are asked for. A stream's rows are not known, and are done live.

A resumed run takes up the files. What is missing is made again from the starting weights, never from the resumed
ones."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunery.config import build
from tunery.data.loader import Loader, cut
from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import ConfigError
from tunery.job import Job
from tunery.policy import REFERENCE
from tunery.progress import clock_text, human
from tunery.run_folder import CONFIG, changed_keys
from tunery.setup import Run, load_start
from tunery.types import Batch

START = "start.safetensors"
FILES = {"train": "reference_train.npy", "eval": "reference_eval.npy"}
START_KEYS = ("model.name", "model.init_from", "model.revision", "model.random_init")  # what decides the start
DISK = 0.5  # of what is free, that the files may take
WINDOW = 1024  # examples packed and gathered from the ranks at a time


def needs_reference(objective: Any) -> bool:
    return bool(getattr(objective, "reference", False))


def keep_reference(run: Run, console: Any = None) -> None:
    """Give the run's policy its reference where its objective needs one. Raises ConfigError where `cached` was asked
    for and cannot be, and where the checkpoint that is gone on from began elsewhere. `console`: a rich console for the
    progress of the pass, on the first rank."""
    if not needs_reference(run.objective):
        return
    _same_start(run)
    if run.resume is None and not run.adapter.whole and run.engine.is_main:
        _save_start(run.model, run.output / START)
    run.engine.barrier()
    wanted = getattr(run.job.objective, "reference", "auto")
    why_not = "it was asked to" if wanted == "live" else _unknown_rows(run) or _no_room(run)
    if why_not is None:
        _keep_logps(run, console)
        if getattr(run.objective, "companions", None) is not None:  # sequences that are in no file
            run.policy.at_start = _starting(run)
        return
    if wanted == "cached":
        raise ConfigError(f"objective.reference: the log-probs cannot be kept, because {why_not}; set it to live")
    run.policy.at_start = _starting(run)
    run.policy.notes.append(f"the reference runs beside the policy, because {why_not} (objective.reference)")


def _same_start(run: Run) -> None:
    """Raises ConfigError where the run goes on from a checkpoint of a run that started from other weights, of another
    folder: the reference is made from what this job says, and would not be the start."""
    saved = run.resume.parent / CONFIG if run.resume is not None else None
    if saved is None or not saved.is_file():
        return
    changed = [key for key in changed_keys(run.job, saved) if key in START_KEYS]
    if changed:
        raise ConfigError(
            f"train.resume: {run.resume} belongs to a run that started from other weights ({', '.join(changed)} "
            f"differ), and the reference of objective {run.job.objective.kind} is what it started from; give the same "
            f"as {saved}, or begin a new run at that checkpoint with model.init_from"
        )


def measure_with_reference(run: Run) -> None:
    """The same for steps whose numbers nobody will use: nothing is written, and kept log-probs are all 0."""
    if not needs_reference(run.objective):
        return
    if _unknown_rows(run) is None and getattr(run.job.objective, "reference", "auto") != "live":
        nothing = {name: np.zeros(len(store.ids), _dtype(run)) for name, store in _stores(run).items()}
        _read_from(run, nothing)
    else:
        run.policy.at_start = _starting(run)


def drop_reference(run: Run) -> None:
    """The run is finished: its files go."""
    if run.engine.is_main and needs_reference(run.objective):
        for name in (START, *FILES.values()):
            (run.output / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- the starting weights


class Start:
    """A context in which parameters have the values they started with. Nothing is copied: they change places."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]):
        self.pairs = [(parameter, values[name]) for name, parameter in parameters.items()]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        now = [parameter.data for parameter, _ in self.pairs]
        for parameter, value in self.pairs:
            parameter.data = value
        try:
            yield
        finally:
            for (parameter, _), value in zip(self.pairs, now, strict=True):
                parameter.data = value


def starting(job: Job, engine: Engine, model: Any, folder: Path, resumed: bool) -> Start:
    """What trains in `model`, as it was when the run of `folder` began: as it is now or, of a `resumed` run, as saved
    in its folder (adapters) or made again as then."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not resumed:
        return Start(parameters, {name: p.detach().clone() for name, p in parameters.items()})
    values = _saved_start(folder / START, parameters)
    if values is None:
        fresh, _ = load_start(job, build("adapters", job.adapter), None, engine)
        values = {name: p.detach() for name, p in fresh.named_parameters() if p.requires_grad}
        engine.same_weights(values.values())
    return Start(parameters, values)


def _starting(run: Run) -> Start:
    return starting(run.job, run.engine, run.model, run.output, resumed=run.resume is not None)


def _save_start(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: p.detach().cpu().contiguous().clone() for name, p in model.named_parameters() if p.requires_grad}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def _saved_start(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor] | None:
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    saved = load_file(path)
    if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in parameters.items()}:
        return None
    return {name: saved[name].to(p) for name, p in parameters.items()}


# ---------------------------------------------------------------- log-probs on disk


def _unknown_rows(run: Run) -> str | None:
    """Why the run's rows cannot be asked for beforehand, or None."""
    if getattr(run.objective, "generates", False):
        return "the answers are generated"
    return None if isinstance(run.loader, Loader) else "the data are streamed"


def _no_room(run: Run) -> str | None:
    size = sum(len(store.ids) for store in _stores(run).values()) * _dtype(run).itemsize
    missing = [name for name in _stores(run) if not (run.output / FILES[name]).is_file()]
    free = min(run.engine.gather(shutil.disk_usage(run.output).free))
    if missing and size > DISK * free:
        return f"they take {human(size)}B, and {run.output} has {human(free)}B free"
    return None


def _stores(run: Run) -> dict[str, TokenStore]:
    stores = {"train": run.data.train, "eval": run.data.eval}
    return {name: store for name, store in stores.items() if isinstance(store, TokenStore)}


def _dtype(run: Run) -> np.dtype:
    return np.dtype(np.float64 if run.engine.dtype == torch.float64 else np.float32)


def _keep_logps(run: Run, console: Any) -> None:
    """Log-probs of the reference for all rows the run comes to, from the files, or first by a pass into them."""
    stores, began = _stores(run), time.perf_counter()
    kept = {name: _opened(run, name, store) for name, store in stores.items()}
    missing = {name: store for name, store in stores.items() if kept[name] is None}
    if missing:
        run.policy.at_start = _starting(run) if run.resume is not None else nullcontext
        wanted = {
            name: rows_to_come(run) if name == "train" else first_of_each(store) for name, store in missing.items()
        }
        tokens = sum(int(missing[name].lengths[numbers].sum()) for name, numbers in wanted.items())
        with _progress(console, tokens) as advance:
            for name, store in missing.items():
                _pass(run, store, wanted[name], run.output / FILES[name], advance)
        run.policy.at_start = None
        kept = {name: _opened(run, name, store) for name, store in stores.items()}
        run.policy.notes.append(
            f"the reference's log-probs of {human(tokens)} tokens were computed once, in "
            f"{clock_text(time.perf_counter() - began)}, and are read from {', '.join(FILES[name] for name in stores)}"
        )
    _read_from(run, {name: array for name, array in kept.items() if array is not None})


def _read_from(run: Run, kept: Mapping[str, np.ndarray]) -> None:
    """Have the run's rows bring along their reference's log-probs."""
    extended = {name: store.with_extra(REFERENCE, kept[name]) for name, store in _stores(run).items()}
    assert isinstance(run.loader, Loader)
    run.data = replace(run.data, **extended)
    run.loader.store = extended["train"]


def _opened(run: Run, name: str, store: TokenStore) -> np.ndarray | None:
    """A file that is there, mapped; None on every rank where it is missing, or not of these rows."""
    path, array = run.output / FILES[name], None
    if path.is_file():
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.shape != store.ids.shape or array.dtype != _dtype(run):
            array = None
    return array if all(run.engine.gather(array is not None)) else None


def first_of_each(store: TokenStore, numbers: np.ndarray | None = None) -> np.ndarray:
    """Examples of a view (all, or `numbers`), one of each that it shows several times. int64, sorted."""
    numbers = np.arange(len(store)) if numbers is None else np.unique(numbers)
    at = numbers if store.index is None else store.index[numbers]
    return np.sort(numbers[np.unique(at, return_index=True)[1]])


def rows_to_come(run: Run) -> np.ndarray:
    """Training examples in the steps of the whole run, one of each."""
    loader = run.loader
    assert isinstance(loader, Loader) and isinstance(run.data.train, TokenStore)
    if run.total_steps >= loader.steps_per_epoch:
        return first_of_each(run.data.train)
    numbers = np.concatenate([np.asarray(loader.rows(step), dtype=np.int64) for step in range(run.total_steps)])
    return first_of_each(run.data.train, numbers)


def _pass(run: Run, store: TokenStore, numbers: np.ndarray, path: Path, advance: Callable[[int], None]) -> None:
    """Write the reference's log p of each trained token, at the place of the token before it, which predicts it. Rows
    that were not asked for are not numbers. The ranks share the work, and the first one writes."""
    partial = path.with_suffix(".partial")
    array = None
    try:
        if run.engine.is_main:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=_dtype(run), shape=store.ids.shape)
            array[:] = np.nan
        for start in range(0, len(numbers), WINDOW):
            window = numbers[start : start + WINDOW].tolist()
            streams = cut([store.sequences(number) for number in window], window, run.cut)
            found = [_stream_logps(run, store, batch, advance) for batch in streams]
            for places, values in [pair for pairs in run.engine.gather(found) for pair in pairs]:
                if array is not None:
                    array[places] = values
        if array is not None:
            array.flush()
            del array
            os.replace(partial, path)
    finally:
        if run.engine.is_main:
            partial.unlink(missing_ok=True)
    run.engine.barrier()


def _stream_logps(
    run: Run, store: TokenStore, batch: Batch, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Places in the store, and what stands there, of all tokens of one stream (0 where nothing is trained)."""
    there = batch.to(run.engine.device)
    logps_N = run.policy.reference_logps(there)[there.labelled_N].to("cpu").numpy()
    spans = [span for number in dict.fromkeys(batch.rows) for span in store.spans(number)]
    trained = [start + np.flatnonzero(store.weights[start + 1 : stop]) for start, stop in spans]
    places = np.concatenate([np.arange(start, stop) for start, stop in spans])
    values = np.zeros(len(places), dtype=_dtype(run))
    values[np.isin(places, np.concatenate(trained))] = logps_N
    advance(len(places) * run.engine.world)
    return places, values


@contextmanager
def _progress(console: Any, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar over the tokens of the pass on a terminal, a line elsewhere. Yields what is called with those done."""
    if console is None or not console.is_terminal:
        if console is not None:
            console.print(f"reference: log-probs of {human(tokens)} tokens", highlight=False)
        yield lambda done: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("reference log-probs"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=tokens, rate="")

        def advance(done: int) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{human(speed)} tokens/s" if speed else "")

        yield advance
