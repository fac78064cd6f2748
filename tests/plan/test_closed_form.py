"""Oracle: the same model run on shapes."""

from __future__ import annotations

import pytest
import torch

from plan_jobs import job_of, stream
from tunery.config import build
from tunery.plan.closed_form import closed_form, inner_size
from tunery.plan.shadow import Shadow, trace


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("rung", ["none", "full"])
def test_the_formula_is_near(tmp_path, adapter, rung):
    job = job_of(tmp_path, "llama", adapter=adapter, kernels="reference")
    shapes = Shadow(job, torch.bfloat16)
    exact = trace(shapes, build("objectives", job.objective), stream(), rung)
    near = closed_form(shapes, stream(), rung, "cpu", accumulates=False)
    assert near.kept == pytest.approx(exact.kept, rel=0.5)
    flops = [sum(flops * often for (_, flops, _), often in p.work().items()) for p in (near, exact)]
    assert flops[0] == pytest.approx(flops[1], rel=0.3)


def test_layers_of_several_widths_count_as_the_widest():
    from transformers import Gemma3nTextConfig, LlamaConfig

    assert inner_size(Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[40, 48])) == 48
    assert inner_size(LlamaConfig(intermediate_size=40)) == 40
