"""The teacher of a distillation: another model with the same tokenizer, frozen, that runs beside the student. It may be
what a run left, an adapter on its own base.

An objective whose `teacher` names one gets it (setup.py); its logits come from `policy.teacher_logits`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import DataError, ModelError
from tunery.job import Job
from tunery.kernels.divergence import LazyLogits
from tunery.models.fuse import fuse
from tunery.models.load import hook_attention, load_config, load_model, load_tokenizer
from tunery.models.target import Target, is_reward_model, load_adapter, model_config, resolve_target
from tunery.objectives.distill import IDS
from tunery.policy import CausalPolicy
from tunery.types import Batch


def teacher_of(job: Job) -> Target | None:
    """The model that the job's objective learns from, found, to be loaded as the job's own is. Raises ModelError where
    there is none of that name, or it scores answers and gives none."""
    name = getattr(job.objective, "teacher", None)
    own = job.model
    if name is None:
        return None
    try:
        found = resolve_target(name)
        trust = own.trust_remote_code or found.base.trust_remote_code
        options = {"attention": own.attention, "trust_remote_code": trust}
        found = replace(found, base=found.base.model_copy(update=options))
        if is_reward_model(found):
            raise ModelError(f"{name}: is a reward model, which scores answers and gives none")
    except ModelError as error:
        raise ModelError(f"objective.teacher: {error}") from None
    return found


class Teacher:
    """Batch -> the logits of its labelled rows, by a frozen model in evaluation mode."""

    def __init__(self, policy: CausalPolicy):
        self.policy = policy
        policy.model.eval().requires_grad_(False)

    def __call__(self, batch: Batch) -> LazyLogits:
        with torch.no_grad():
            return self.policy.lazy_logits(batch)

    @property
    def shares(self) -> bool:
        return self.policy.shares


def load_teacher(job: Job, engine: Engine) -> Teacher | None:
    """The job's teacher on the engine's device, in the arithmetic's dtype; None where there is none."""
    teacher = teacher_of(job)
    if teacher is None:
        return None
    automatic = teacher.base.attention == "auto"
    model: Any = load_model(teacher.base, engine.dtype, engine.device, None if automatic else teacher.base.attention)
    if automatic:
        hook_attention(model, reference=job.kernels.attention == "reference")
    if teacher.adapter is not None:
        model = load_adapter(model, teacher.adapter)
    fuse(model, job.kernels, engine.dtype)
    return Teacher(CausalPolicy(model, dtype=engine.dtype, max_length=job.data.max_length))


def check_teacher(job: Job, tokenizer: Any) -> None:
    """Raises ModelError where the teacher gives the student's ids another meaning. It may know more tokens, and heads
    may be padded differently: what only one of the two has is not compared."""
    teacher = teacher_of(job)
    if teacher is None:
        return
    named = model_config(teacher.tokenizer, trust_remote_code=teacher.base.trust_remote_code)
    theirs, size = load_tokenizer(named).get_vocab(), load_config(teacher.base).get_text_config().vocab_size
    ours = tokenizer.get_vocab()
    different = [token for token, number in sorted(ours.items(), key=_number) if theirs.get(token) != number]
    what = f"objective.teacher: {teacher.name} has another vocabulary than {job.model.name}"
    advice = "a teacher must have the student's tokenizer, such as a larger model of the same family"
    if different:
        token = different[0]
        raise ModelError(
            f"{what}: {len(different):,} of {len(ours):,} tokens differ, the first is {token!r}, number {ours[token]} "
            f"here and {theirs.get(token, 'none')} there; {advice}"
        )
    if size <= max(ours.values()):
        raise ModelError(f"{what}: its head has {size:,} entries, too few for token {max(ours.values()):,}; {advice}")


def check_kept(job: Job, stores: Sequence[Any]) -> None:
    """Raises DataError where a row's kept log-probabilities are of a token that the student's head does not have."""
    if getattr(job.objective, "top_k", None) is None:
        return
    size = load_config(job.model).get_text_config().vocab_size
    for store in [store for store in stores if isinstance(store, TokenStore)]:
        for name, ids in store.token_extra.items():
            beyond = np.flatnonzero(ids >= size) if name.startswith(IDS) else np.zeros(0, int)
            if len(beyond):
                sequence = int(np.searchsorted(store.sequence_offsets, beyond[0], side="right")) - 1
                example = int(np.searchsorted(store.example_offsets, sequence, side="right")) - 1
                where = f"{store.files[int(store.file_index[example])]}:{store.rows[example]}"
                raise DataError(
                    f'{where}: column "teacher" names token {ids[beyond[0]]:,}, and {job.model.name} has {size:,}; a '
                    "teacher must have the student's tokenizer"
                )


def _number(item: tuple[str, int]) -> int:
    return item[1]
