"""Whether a run computes its frozen layers once and keeps what they give (models/boundary.py), and where."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

from tunery.data.loader import Loader
from tunery.data.store import TokenStore
from tunery.errors import ConfigError
from tunery.flops import cost_of, frozen_share
from tunery.host import free_memory
from tunery.models.boundary import FILE, Boundary, Probed
from tunery.plan.frozen_states import never, no_room, not_worth_it
from tunery.progress import human
from tunery.setup import Run


def keep_frozen_states(run: Run) -> None:
    """Give the run's policy a boundary where its adapter asks for one (`adapter.cache`) and it is exact, say so, and
    take up what a run that is resumed had kept. Raises ConfigError where it was asked for and cannot be."""
    wanted = getattr(run.job.adapter, "cache", False)
    if run.start and wanted is not False:  # as it began: the last bits of a run with and one without are not the same
        wanted = bool(run.state.get("frozen_states"))
    if wanted is False:
        return
    why_not, probed = _exact(run)
    if why_not is None:
        why_not = _room(run, probed, demanding=wanted == "auto")
    why_not = next((why for why in run.engine.gather(why_not) if why is not None), None)
    if why_not is not None and wanted is True:
        raise ConfigError(
            f"adapter.cache: the frozen layers' states cannot be kept, because {why_not}; set it to false"
        )
    if why_not is not None:
        run.policy.notes.append(f"every epoch runs the frozen layers, because {why_not} (adapter.cache)")
        return
    # What is kept is of whole sequences.
    run.cut = run.loader.how = replace(run.cut, share=False)
    boundary = _open(run, probed)
    _take_up(run, boundary)
    run.policy.notes.append(
        f"the {len(boundary.below)} frozen layers run in the first epoch; later ones begin with what they gave "
        f"({human(_size(run, probed))}B in {FILE}), which saves {skipped_flops(run):.0%} of the run's arithmetic"
    )


def begin_step(run: Run, step: int) -> None:
    """Before a step's first forward: from the second epoch on, the frozen states are read."""
    boundary = run.policy.boundary
    if boundary is not None and not boundary.reading and step >= _steps_per_epoch(run):
        mark_frozen_states(run, step)
        boundary.reading = True


def mark_frozen_states(run: Run, step: int) -> None:
    """Before the checkpoint of a step: what its first epoch had kept by then can be taken up from the file."""
    boundary = run.policy.boundary
    if boundary is not None and not boundary.reading:
        boundary.mark(min(step, _steps_per_epoch(run)), run.engine.barrier, run.engine.is_main)


def drop_frozen_states(run: Run) -> None:
    """The run is finished: its file goes."""
    if run.policy.boundary is not None:
        run.policy.boundary.close(run.engine.is_main)
        run.policy.boundary = None


def skipped_flops(run: Run) -> float:
    """The share of the run's arithmetic that later epochs need not do. The whole is that of a run without a boundary;
    head and layers that train count with their backward."""
    store = run.data.train
    assert isinstance(store, TokenStore)
    lengths = store.lengths
    frozen = frozen_share(
        cost_of(run.model), labelled=float(store.labelled.sum() / lengths.sum()),
        mean_length=float((lengths**2).sum() / lengths.sum()),
    )  # fmt: skip
    return frozen * (1 - _steps_per_epoch(run) / run.total_steps)


# ---------------------------------------------------------------- may it be


def _exact(run: Run) -> tuple[str | None, Probed]:
    """What forbids it whatever the machine, and what the probe found."""
    nothing = Probed(None)
    if not isinstance(run.loader, Loader):
        streamed = not isinstance(run.data.train, TokenStore)
        return "the data are streamed" if streamed else "the answers are generated", nothing
    why_not = never(run.job, run.total_steps, run.loader.steps_per_epoch)
    if why_not is not None:
        return why_not, nothing
    if run.engine.world > int(os.environ.get("LOCAL_WORLD_SIZE", run.engine.world)):
        return "its ranks are on several machines, which would have to share the file", nothing
    probed = run.policy.probe_boundary()
    return probed.why_not, probed


def _room(run: Run, probed: Probed, demanding: bool) -> str | None:
    """Whether the file fits and, where that is left to us, pays. A file that is there already has its room."""
    size = _size(run, probed)
    file = run.output / FILE
    taken = file.stat().st_blocks * 512 if file.is_file() else 0
    free = shutil.disk_usage(run.output).free + taken
    why_not = no_room(size, free, run.output)
    return not_worth_it(size, skipped_flops(run), free_memory()) if why_not is None and demanding else why_not


def _size(run: Run, probed: Probed) -> int:
    assert isinstance(run.data.train, TokenStore)
    return int(run.data.train.lengths.sum()) * probed.width * probed.dtype.itemsize


def _steps_per_epoch(run: Run) -> int:
    assert isinstance(run.loader, Loader)
    return run.loader.steps_per_epoch


# ---------------------------------------------------------------- the file


def _open(run: Run, probed: Probed) -> Boundary:
    """The file, made by the first rank and mapped by all."""
    assert isinstance(run.data.train, TokenStore)
    boundary = Boundary(run.model, run.data.train.lengths)
    for first in (True, False):
        if first == run.engine.is_main:
            boundary.open(run.output, probed.width, probed.dtype, afresh=run.start == 0, first=first)
        run.engine.barrier()
    return boundary


def _take_up(run: Run, boundary: Boundary) -> None:
    """Of a resumed run: what was kept before its checkpoint, from the file where it is there, and else by running the
    frozen layers again on the streams of those steps."""
    run.policy.boundary = boundary
    done = min(run.start, _steps_per_epoch(run)) if run.start < run.total_steps else 0
    if boundary.steps < done:
        run.model.train()
        for step in range(done):
            for batch in run.loader.step(step).micro:
                run.policy.run_frozen(batch.to(run.engine.device))
    begin_step(run, run.start)
