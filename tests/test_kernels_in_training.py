"""Whole runs with every fast path on. Oracle: the same run with `kernels: reference`."""

from __future__ import annotations

import pytest

from tiny_runs import losses, tiny_job
from tunery.loop import run_job


@pytest.mark.parametrize("adapter", [{"kind": "lora", "rank": 4}, "full", {"kind": "freeze", "layers": 1}], ids=str)
def test_the_loss_curve_is_the_reference_s_over_50_steps(tmp_path, adapter):
    """In float32, each step within 1e-3, while the loss falls by far more than that."""
    curves = []
    for kernels in ("auto", "reference"):
        job = tiny_job(
            tmp_path, adapter=adapter, kernels=kernels, model={"dtype": "float32"}, data={"eval": None},
            optimizer={"lr": 3e-3}, train={"epochs": 9, "max_steps": 50, "save_every": 50},
            output=str(tmp_path / kernels),
        )  # fmt: skip
        run_job(job)
        curves.append(losses(job.output))
    fast, reference = curves
    assert len(fast) == 50 and fast[0] - fast[-1] > 0.02
    assert fast == pytest.approx(reference, rel=0, abs=1e-3)
