"""Oracle: by hand. A forward is a third of a step where every weight trains, and more where only an adapter does; what
is done once, beside each step, or kept is counted as such."""

from __future__ import annotations

import numpy as np
import pytest

from plan_jobs import job_of
from tunery.data.store import Chunk, TokenStore, pack_store
from tunery.devices import known_device
from tunery.plan.bill import make_plan
from tunery.plan.planner import Planner
from tunery.plan.reference import forward_share, reference_cost
from tunery.plan.work import AssumedRows
from tunery.types import Tokens

GPU = known_device("4090")
COUNT, LENGTH = 12, 48


def pairs() -> TokenStore:
    """All answers alike in length, without a shared beginning."""
    weights = np.repeat([0.0, 1.0], LENGTH // 2).astype(np.float32)
    rows = [[Tokens(np.full(LENGTH, 5 + 2 * n + side, np.int32), weights) for side in (0, 1)] for n in range(COUNT)]
    return pack_store([Chunk(rows, [(0, 0, n + 1) for n in range(COUNT)])], ["rows.jsonl"])


def planner(folder, objective, adapter="full", rows=None, **train) -> Planner:
    job = job_of(
        folder, objective=objective, adapter=adapter, train={"checkpointing": "none", "batch_size": 4, **train}
    )  # fmt: skip
    return Planner(job, pairs() if rows is None else rows, GPU)


@pytest.mark.parametrize(("adapter", "low", "high"), [("full", 0.3, 0.4), ("lora", 0.4, 0.6)])
def test_the_forwards_share(tmp_path, adapter, low, high):
    found = planner(tmp_path, "dpo", adapter)
    work = found.work(1024)
    assert low < forward_share(found.profile(work.largest, "none", work.accumulates)) < high
    assert found.note is None  # it ran on shapes, pairs and all


def test_what_each_way_costs(tmp_path):
    """Three steps an epoch, two epochs."""
    cached, live = (planner(tmp_path / way, {"kind": "dpo", "reference": way}, epochs=2) for way in ("cached", "live"))
    first, second = (reference_cost(one, 1024, "none") for one in (cached, live))
    assert first is not None and second is not None
    assert (first.each_step, first.memory, first.disk) == (0.0, 0, 4 * COUNT * 2 * LENGTH)
    assert (second.once, second.disk, second.memory) == (0.0, 0, live.shadow.gradient_bytes)
    assert first.once == pytest.approx(3 * second.each_step)
    plans = [make_plan(one) for one in (cached, live)]
    steps = cached.seconds(plans[0].micro_tokens, "none")
    assert plans[0].seconds == pytest.approx(6 * steps + first.once)
    assert plans[1].seconds == pytest.approx(6 * (steps + second.each_step))
    assert any("come first, in one pass" in note for note in plans[0].notes)
    assert any("runs beside the policy" in note for note in plans[1].notes)


def test_none_where_none_is_needed_and_a_guess_where_rows_are_not_known(tmp_path):
    assert reference_cost(planner(tmp_path / "sft", "sft"), 1024, "none") is None
    assert reference_cost(planner(tmp_path / "free", {"kind": "dpo", "reference": "none"}), 1024, "none") is None
    unknown = planner(tmp_path / "assumed", "dpo", rows=AssumedRows(4, 64))
    plan = make_plan(unknown)
    assert plan.seconds_per_step > 0 and any("reference" in note for note in plan.notes)
