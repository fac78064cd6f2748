"""The teacher of a distillation, as a plan sees it: its weights, and logits in the place of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch

from tunery.job import Job
from tunery.kernels.divergence import LazyLogits
from tunery.models.load import from_config, load_config
from tunery.policy import CausalPolicy
from tunery.teacher import teacher_of
from tunery.types import Batch


def teacher_bytes(job: Job, dtype: torch.dtype) -> int:
    """Of its weights in `dtype`, from its config.json, and of its adapter's file; 0 for a job without one."""
    teacher = teacher_of(job)
    if teacher is None:
        return 0
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(load_config(teacher.base))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = from_config(AutoModelForCausalLM, teacher.base, config, dtype=dtype)
    files = teacher.adapter.glob("adapter_model.*") if teacher.adapter is not None else ()
    return sum(p.numel() * p.element_size() for p in model.parameters()) + sum(f.stat().st_size for f in files)


def in_its_place(policy: CausalPolicy) -> Callable[[Batch], LazyLogits]:
    """Logits as the student's head would make them: what they need is that of a teacher with as wide a head. What the
    teacher's layers need for a moment is left out."""

    def teacher(batch: Batch) -> LazyLogits:
        text = policy.causal.config.get_text_config()
        rows, head = len(batch.labelled_N), policy.causal.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            return LazyLogits(torch.zeros(rows, text.vocab_size), text.vocab_size, head=lambda z: z)
        h_NH = torch.zeros(rows, head.weight.shape[1], dtype=policy.dtype)
        return LazyLogits(h_NH, head.weight.shape[0], head.weight)

    return teacher
