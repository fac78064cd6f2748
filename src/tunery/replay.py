"""`tunery replay`: a step that was not finite, once more, from what the run kept of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from tunery import guard
from tunery.config import build
from tunery.critic import give_values
from tunery.engine import Engine
from tunery.errors import TuneryError
from tunery.job import load_job
from tunery.observe import put_back
from tunery.policy import REFERENCE
from tunery.reference import needs_reference, starting
from tunery.run_folder import CONFIG
from tunery.setup import load_start, make_policy
from tunery.teacher import load_teacher


def replay(folder: Path) -> Iterator[str]:
    """Lines that say what happened then and what happens now. `folder` is the run folder (its newest failure) or the
    failure's own. Raises TuneryError when there is nothing to replay."""
    failures = sorted(folder.glob("failure-step-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    if not (folder / guard.RECORD).is_file():
        if not failures:
            raise TuneryError(f"{folder}: no failure-step-N folder in it, so nothing to replay")
        folder = failures[-1]
    record, ranks = guard.load_failure(folder)
    job = load_job(folder.parent / CONFIG)
    engine = Engine(job.model.dtype)
    model, _ = load_start(job, build("adapters", job.adapter), folder, engine)
    policy = make_policy(job, model, engine.dtype)
    policy.teacher = load_teacher(job, engine)
    objective, step = build("objectives", job.objective), record["step"]
    put_back(objective, record.get("objective"))
    give_values(job, objective, policy, engine, folder, resumed=True)
    if needs_reference(objective) and any(REFERENCE not in batch.extra for batches in ranks for batch in batches):
        policy.at_start = starting(job, engine, model, folder.parent, resumed=True)
    model.train()
    yield f"{folder}: step {step + 1}, {sum(map(len, ranks))} streams; then:"
    for found in record["findings"]:
        yield from (f"  {guard.Finding(**finding)}" for finding in found)
    yield "now:"
    for rank, batches in enumerate(ranks):
        seed = functools.partial(engine.seed, job.train.seed, step, rank)
        moved = [batch.to(engine.device) for batch in batches]
        for finding in guard.investigate(model, objective, policy, moved, seed):
            rows = ", ".join(record["origins"].get(str(row), str(row)) for row in finding.rows[:4])
            yield f"  {finding}" + (f"; rows: {rows}" if finding.module else "")
