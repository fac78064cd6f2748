"""The smallest changes that make a run fit, one below the other, each with its memory and its cost in speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tunery.adapters import lora
from tunery.models.rungs import RUNGS
from tunery.plan.choose import largest, least, rungs_of
from tunery.plan.planner import Memory, Planner

# Bytes of a parameter in NF4 with double quantisation (arXiv:2305.14314, section 3), and of an 8-bit Adam's states as
# against two moments in float32 (arXiv:2110.02861).
NF4, EIGHT_BIT = 0.52, 1 / 4
RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Change:
    """One rung. `memory` in bytes with it, at `micro_tokens`; `slower` the factor on time (None: not known);
    `settings` what to set in the job, None for what this version cannot do yet."""

    what: str
    memory: int
    fits: bool
    micro_tokens: int
    slower: float | None
    settings: dict[str, Any] | None


def ladder(planner: Planner) -> list[Change]:
    """The changes for a job that does not fit with its largest micro-batches on its first rung: those that can be set,
    and what further ones would give beneath the last of them."""
    first, most = rungs_of(planner.job, planner.device)[0], planner.most
    before = planner.seconds(most, first)
    changes = []
    for rung in RUNGS[RUNGS.index(first) :]:
        if rung == "offload" and planner.device.kind == "cpu":
            continue
        tokens = largest(planner, rung) or least(planner)
        if rung == first and tokens == most:
            continue
        settings: dict[str, Any] = {"train.micro_tokens": tokens} if tokens != most else {}
        if rung != first:
            settings["train.checkpointing"] = rung
        slower = planner.seconds(tokens, rung) / before
        changes.append(_change(planner, _words(settings), planner.memory(tokens, rung), tokens, slower, settings))
    tokens = least(planner)
    if planner.shadow.whole and planner.job.adapter.kind == "full":
        changes.append(_with_lora(planner, before))
    return changes + _not_yet(planner, tokens, RUNGS[-1] if planner.device.kind == "cuda" else "full", before)


def _change(
    planner: Planner, what: str, memory: Memory, tokens: int, slower: float | None, settings: dict[str, Any] | None
) -> Change:
    return Change(what, memory.total, memory.total <= planner.device.memory, tokens, slower, settings)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _with_lora(planner: Planner, before: float) -> Change:
    """Another thing to train, and a hundredth of what training it takes."""
    job = planner.job.model_copy(update={"adapter": lora.Config.model_validate({})})
    other = Planner(job, planner.rows, planner.device, planner.world)
    rung = rungs_of(job, planner.device)[0]
    tokens = largest(other, rung) or least(other)
    settings = {"adapter": "lora"} | ({"train.micro_tokens": tokens} if tokens != other.most else {})
    slower = other.seconds(tokens, rung) / before
    return _change(planner, _words(settings), other.memory(tokens, rung), tokens, slower, settings)


def _not_yet(planner: Planner, tokens: int, rung: str, before: float) -> list[Change]:
    """What is not in this version, beneath the last rung that is."""
    memory, seconds = planner.memory(tokens, rung), planner.seconds(tokens, rung)
    changes = []
    if planner.device.kind != "cuda":
        return changes
    if memory.optimizer > 0.02 * planner.device.memory:
        smaller = replace(memory, optimizer=int(EIGHT_BIT * memory.optimizer))
        changes.append(_change(planner, "8-bit optimizer states", smaller, tokens, seconds / before, None))
    frozen = planner.shadow.frozen_matrices
    if frozen and not planner.shadow.whole:
        width = planner.dtype.itemsize
        smaller = replace(memory, weights=memory.weights - int((width - NF4) * frozen))
        # Each forward and backward reads the small matrix and writes and reads the large one.
        unpacking = 2 * frozen * (NF4 + 2 * width) / planner.device.rates.bytes
        streams = planner.work(tokens).streams
        slower = (seconds + unpacking * sum(map(len, streams)) / len(streams)) / before
        changes.append(_change(planner, "frozen weights in 4 bits (QLoRA)", smaller, tokens, slower, None))
    for ranks in RANKS:
        shared = memory.weights + memory.optimizer + memory.gradients
        one = replace(
            memory, weights=memory.weights // ranks + planner.shadow.largest_layer,
            optimizer=memory.optimizer // ranks, gradients=memory.gradients // ranks,
        )  # fmt: skip
        if shared > 0.2 * planner.device.memory:
            changes.append(_change(planner, f"{ranks} ranks with FSDP, of each", one, tokens, None, None))
            if changes[-1].fits:
                break
    return changes
