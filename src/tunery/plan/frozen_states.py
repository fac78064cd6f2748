"""What a run saves that computes its frozen layers once (`adapter.cache`; see frozen.py for the run itself), what that
takes, and when it is left alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tunery.flops import cost_of, frozen_share
from tunery.host import free_memory
from tunery.job import Job
from tunery.models.parts import draws
from tunery.plan.planner import Planner
from tunery.progress import human

PAYS = 0.05  # of the run's arithmetic, that has to be saved for a file to be worth it
DISK, MEMORY = 0.5, 0.5  # of what is free, that the file may take; it is read at random, so it should stay in memory


def never(job: Job, steps: int, steps_per_epoch: int) -> str | None:
    """What forbids it whatever the model and the machine, of a run over rows that are read."""
    if steps <= steps_per_epoch:
        return "the run sees each row once"
    if job.train.neftune is not None:
        return "train.neftune adds new noise to the embeddings at every step"
    return None


def no_room(size: int, disk: int, folder: Path) -> str | None:
    """Whether a file of `size` bytes fits where `disk` are free."""
    return f"what they give takes {human(size)}B, and {folder} has {human(disk)}B free" if size > DISK * disk else None


def not_worth_it(size: int, saved: float, memory: int | None) -> str | None:
    """Whether it pays, where it saves such a share of the run's arithmetic and `memory` bytes are free."""
    if saved < PAYS:
        return f"running them once would save no more than {saved:.1%} of the run's arithmetic"
    if memory is not None and size > MEMORY * memory:
        return f"what they give takes {human(size)}B, and {human(memory)}B of memory are free to hold it"
    return None


@dataclass(frozen=True)
class FrozenStates:
    """`disk`: bytes while the run lasts; `first`: the share of the run's steps that are of the first epoch; `seconds`
    of a mean one of those and of a `later` one; `executed` FLOPs of a mean token; `saved`: the share of the run's
    useful arithmetic."""

    disk: int
    first: float
    seconds: float
    later: float
    executed: float
    saved: float

    @property
    def each_step(self) -> float:
        """Seconds that a mean step takes more: less than nothing."""
        return (1 - self.first) * (self.later - self.seconds)

    @property
    def note(self) -> str:
        return (
            f"the frozen layers run in the first epoch; later steps begin with what they gave ({human(self.disk)}B in "
            f"the run folder) and take {self.later / self.seconds:.2f} of the time (adapter.cache)"
        )


def frozen_states(planner: Planner, micro_tokens: int, rung: str) -> FrozenStates | str | None:
    """Of the planner's job with such a cut: what keeping them comes to, or why every epoch runs the frozen layers. None
    where nobody asks, or the rows are not known."""
    job, work, output = planner.job, planner.work(micro_tokens), Path(planner.job.output)
    wanted = getattr(job.adapter, "cache", False)
    if wanted is False or work.steps is None or work.steps_per_epoch is None:
        return None
    why_not = never(job, work.steps, work.steps_per_epoch)
    if getattr(planner.objective, "generates", False):
        why_not = "the answers are generated"
    if why_not is None and not planner.shadow.below:
        why_not = "the first layer trains"
    if why_not is None and draws(planner.shadow.model):
        why_not = "there is dropout or noise in the frozen layers"
    if why_not is not None:
        return why_not
    first = work.steps_per_epoch / work.steps
    share = frozen_share(cost_of(planner.shadow.model), labelled=work.labelled, mean_length=work.mean_length)
    size = int(planner.rows.lengths.sum()) * planner.shadow.hidden_bytes
    here = planner.device.table is None  # else it is another machine's disk and memory
    why_not = no_room(size, shutil.disk_usage(_there(output)).free, output) if here else None
    if why_not is None and wanted == "auto":
        why_not = not_worth_it(size, share * (1 - first), free_memory() if here else None)
    if why_not is not None:
        return why_not
    both = [planner.executed_flops(micro_tokens, rung, reading) for reading in (False, True)]
    seconds, later = (planner.seconds(micro_tokens, rung, reading) for reading in (False, True))
    executed = first * both[0] + (1 - first) * both[1]
    return FrozenStates(size, first, seconds, later, executed, share * (1 - first))


def _there(output: Path) -> Path:
    """A folder on the disk that the run folder will be on."""
    return next(folder for folder in (output, *output.resolve().parents) if folder.is_dir())
