"""Oracle: the real thing. The same model with numbers, at its full depth, under torch's own count of what autograd
saves (saved_tensors_hooks) and under the same ledger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from plan_jobs import LENGTHS, job_of, stream
from tunery.config import build
from tunery.data.collate import collate
from tunery.job import Job
from tunery.memory import Ledger
from tunery.models.fuse import fuse
from tunery.models.load import hook_attention, load_model
from tunery.models.recompute import recompute
from tunery.plan.shadow import Shadow, optimizer_cost, trace
from tunery.policy import CausalPolicy
from tunery.types import Tokens

SHAPES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "phi3", "mixtral", "qwen2_moe", "bloom"]


def real(job: Job, dtype: torch.dtype) -> tuple[Any, CausalPolicy, Any]:
    """Model, policy and batch with numbers."""
    model = load_model(job.model, dtype)
    hook_attention(model, reference=job.kernels.attention == "reference")
    model = build("adapters", job.adapter).apply(model)
    fuse(model, job.kernels, dtype)
    policy = CausalPolicy(model, dtype=dtype)
    recompute(model, job.train.checkpointing)
    random = np.random.default_rng(0)
    rows = [Tokens(random.integers(3, 131, n).astype(np.int32), np.ones(n, np.float32)) for n in LENGTHS]
    return model.train(), policy, collate(rows)


def saved_bytes(policy: CausalPolicy, objective: Any, batch: Any, model: Any) -> int:
    """Of the memory that autograd keeps of a forward, parameters and the batch apart."""
    given = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    given |= {t.untyped_storage().data_ptr() for t in vars_of(batch)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective.loss(policy, batch).sum
    total = sum(kept.values())
    loss.backward()
    return total


def vars_of(batch: Any) -> list[torch.Tensor]:
    names = ("ids_T", "targets_T", "weights_T", "positions_T", "labelled_N", "cu_seqlens")
    return [getattr(batch, name) for name in names]


@pytest.mark.parametrize("adapter", ["full", "lora", "freeze"])
@pytest.mark.parametrize("family", SHAPES)
def test_what_is_kept_is_what_autograd_saves(tmp_path, family, adapter):
    job = job_of(tmp_path, family, adapter=adapter)
    model, policy, batch = real(job, torch.bfloat16)
    objective = build("objectives", job.objective)
    saved = saved_bytes(policy, objective, batch, model)
    profile = trace(Shadow(job, torch.bfloat16), objective, stream())
    assert profile.kept == pytest.approx(saved, rel=0.05)


@pytest.fixture(scope="module", params=["full", "lora", "freeze"])
def shapes(request, tmp_path_factory) -> Shadow:
    """One for all rungs, as in a plan."""
    # the blocks of scores of our own attention, which a plan leaves out, are large beside so small a model
    kernels = {"attention": "reference"}
    return Shadow(job_of(tmp_path_factory.mktemp("job"), adapter=request.param, kernels=kernels), torch.float32)


@pytest.mark.parametrize("rung", ["none", "selective", "full"])
def test_the_peak_is_that_of_the_real_step(shapes, rung):
    """Of a step's first micro-batch, and of a later one."""
    train = shapes.job.train.model_copy(update={"checkpointing": rung})
    model, policy, batch = real(shapes.job.model_copy(update={"train": train}), torch.float32)
    objective = build("objectives", shapes.job.objective)
    ledger = Ledger()
    with ledger:
        base = ledger.own([*model.parameters(), *model.buffers(), *vars_of(batch)])
        # the first step of all may also make what later ones find
        for accumulates in (False, False, False, True):
            if not accumulates:
                model.zero_grad(set_to_none=True)
            ledger.enter_span(accumulates)
            objective.loss(policy, batch).sum.backward()
    for span in ledger.spans[-2:]:
        peaks = trace(shapes, objective, stream(), rung, accumulates=span.name is True).peaks()
        assert max(p.dynamic for p in peaks) == pytest.approx(span.peak - base, rel=0.1)
    assert shapes.weight_bytes == sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))


def test_layers_alike_are_run_once(tmp_path):
    kinds = lambda adapter, family: Shadow(job_of(tmp_path, family, adapter=adapter), torch.bfloat16).layers  # noqa: E731
    assert kinds("full", "llama") == [0, 1, 1, 1, 1]
    assert kinds("lora", "llama") == [0, 1, 2, 2, 2]  # nothing trains below the first
    assert kinds("freeze", "llama") == [0, 1, 1, 2, 3]
    assert kinds("full", "gemma2") == [0, 1, 0, 1, 0]  # windows and none


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_optimizer_is_asked(tmp_path, adapter):
    job = job_of(tmp_path, adapter=adapter)
    shapes = Shadow(job, torch.float32)
    state, scratch, work = optimizer_cost(job, shapes)
    steps = 4 * len([p for p in shapes.model.parameters() if p.requires_grad])
    assert state == 2 * shapes.gradient_bytes + steps  # two moments, and the number of the step for each tensor
    assert scratch < 0.1 * shapes.gradient_bytes and work
