"""Oracles: the same run with its numbers read at once; weights before and after; and the device itself, or what stands
in for one on a CPU, refusing to be asked in the middle of a step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_runs import losses, tiny_job
from tunery import loop, step
from tunery.engine import Engine
from tunery.errors import NonFiniteError
from tunery.guard import Gate
from tunery.loop import run_job
from tunery.objectives import sft


class Asked(AssertionError):
    """The device was asked for a number, which waits for all it has queued."""


class NoAnswers(TorchDispatchMode):
    """On a CPU every answer is there at once; this refuses what would wait on a device: values, and shapes that depend
    on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique_", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.WAITS):
            raise Asked(name)
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise Asked(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class NoLists(TorchFunctionMode):
    """The same for what reads memory without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy", "item", "__array__"):
            raise Asked(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing() -> Iterator[None]:
    with NoAnswers(), NoLists():
        yield


@contextmanager
def refused_by_the_device() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def watch(monkeypatch, refuse: Any) -> list[str]:
    """Run what a step does on the device under `refuse`; returns what was run."""
    seen = []

    def watched(module: Any, name: str) -> Any:
        plain = getattr(module, name)

        def call(*args: Any) -> Any:
            seen.append(name)
            with refuse():
                return plain(*args)

        return call

    for module, name in ((step, "forward_backward"), (loop, "update")):
        monkeypatch.setattr(module, name, watched(module, name))
    return seen


JOBS = {
    "lora": {},
    "full": {"adapter": "full", "model": {"dtype": "float32"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "frozen layers once": {"adapter": {"kind": "freeze", "layers": 1}},
    "slow forms": {"kernels": "reference"},
    "noise and dropout": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}, "train": {"neftune": 5.0}},
    "recomputed": {"train": {"checkpointing": "full"}},
    "kept selectively": {"train": {"checkpointing": "selective"}},
    "one by one": {"train": {"packing": False}},
}


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_a_step_asks_the_device_nothing(tmp_path, monkeypatch, changes):
    plain = tiny_job(tmp_path, **changes, output=str(tmp_path / "plain"))
    run_job(plain)
    seen = watch(monkeypatch, refusing)
    job = tiny_job(tmp_path, **changes)
    run_job(job)
    assert seen == ["forward_backward", "update"] * 6
    assert losses(job.output) == losses(plain.output)


@pytest.mark.parametrize(
    "ask",
    [
        lambda h: float(h.sum()), lambda h: h.sum().item(), lambda h: h.tolist(), lambda h: h[h > 0], lambda h: h.cpu(),
        lambda h: h.nonzero(), lambda h: bool((h > 0).any()), lambda h: h.detach().numpy(), lambda h: h.unique(),
    ],
)  # fmt: skip
def test_a_hidden_question_is_found(tmp_path, monkeypatch, ask):
    plain = sft.Objective.loss

    def curious(self: Any, policy: Any, batch: Any) -> Any:
        loss = plain(self, policy, batch)
        if torch.is_grad_enabled():
            ask(loss.sum.detach()[None])
        return loss

    monkeypatch.setattr(sft.Objective, "loss", curious)
    watch(monkeypatch, refusing)
    with pytest.raises(Asked):
        run_job(tiny_job(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_a_device_is_never_waited_for(tmp_path, monkeypatch, changes):
    seen = watch(monkeypatch, refused_by_the_device)
    run_job(tiny_job(tmp_path, **changes))
    assert seen == ["forward_backward", "update"] * 6


# ---------------------------------------------------------------- what is not finite


def make(kind: str, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    """One that torch can hold back on the device, and one that it cannot."""
    if kind == "fused":
        return torch.optim.AdamW([parameter], lr=0.1, fused=True)
    return torch.optim.AdamW([parameter], lr=0.1, foreach=False)


@pytest.mark.parametrize("kind", ["fused", "any"])
def test_the_gate_holds_back_an_update_and_all_after_it(kind):
    free, held = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    alone, optimizer = make(kind, free), make(kind, held)
    gate = Gate(optimizer, held.device)
    assert gate.on_device == (kind == "fused")
    for parameter in (free, held):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    alone.step()
    gate.step(torch.zeros(()))
    assert held.equal(free) and held.ne(1).all()
    before = {name: value.clone() for name, value in optimizer.state[held].items()}
    held.grad = torch.full((3,), math.nan)
    gate.step(torch.tensor(2.0))  # two ranks met something
    held.grad = torch.ones(3)
    gate.step(torch.zeros(()))
    assert gate.shut == 1 and held.equal(free)
    assert all(optimizer.state[held][name].equal(value) for name, value in before.items())


def test_numbers_a_step_late_change_nothing(tmp_path, monkeypatch):
    """What a device does, on a CPU: the same log and weights, and a failure is that of its own step."""
    plain = tiny_job(tmp_path, output=str(tmp_path / "plain"), train={"save_every": 3})
    run_job(plain)
    late_engine(monkeypatch)
    order = recorded_order(monkeypatch)
    late = tiny_job(tmp_path, train={"save_every": 3})
    run_job(late)
    assert losses(late.output) == losses(plain.output)
    # each step's numbers are read once the next is queued, and at once before something that depends on them
    assert order == ["do 0", "do 1", "read 0", "do 2", "read 1", "read 2", "do 3", "do 4", "read 3", "do 5", "read 4",
                     "read 5"]  # fmt: skip


def test_a_failure_read_late_is_found_in_its_own_step(tmp_path, monkeypatch):
    late_engine(monkeypatch)
    job = tiny_job(tmp_path, adapter="full", model={"dtype": "float32"}, data={"eval": None})
    plain, calls = sft.Objective.loss, []

    def broken(self: Any, policy: Any, batch: Any) -> Any:
        loss = plain(self, policy, batch)
        calls.append(batch)
        return type(loss)(loss.sum * math.nan, loss.metrics) if set(batch.rows) & bad else loss

    def note(run: Any, gate: Any, number: int, work: Any, *rest: Any) -> Any:
        if number == 2:
            weights.update({n: p.detach().clone() for n, p in run.model.named_parameters()})
        return update(run, gate, number, work, *rest)

    from tunery.data.order import epoch_order

    bad, weights, update = {int(epoch_order(24, 5, 0, True)[20])}, {}, loop.update
    monkeypatch.setattr(sft.Objective, "loss", broken)
    monkeypatch.setattr(loop, "update", note)
    with pytest.raises(NonFiniteError, match="step 3: "):
        run_job(job)
    from safetensors.torch import load_file

    kept = load_file(Path(job.output) / "failure-step-3" / "model.safetensors")
    assert kept.keys() == weights.keys() and all(kept[name].equal(weights[name]) for name in kept)
    lines = [json.loads(line) for line in (Path(job.output) / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def late_engine(monkeypatch) -> None:
    """An engine that lets one step be queued, as one of a device does."""
    plain = Engine.__init__

    def late(self: Engine, *args: Any) -> None:
        plain(self, *args)
        self.lag = 1

    monkeypatch.setattr(Engine, "__init__", late)


def recorded_order(monkeypatch) -> list[str]:
    order, update, settle = [], loop.update, loop.settle

    def do(run: Any, gate: Any, number: int, *rest: Any) -> Any:
        order.append(f"do {number}")
        return update(run, gate, number, *rest)

    def read(run: Any, report: Any, taken: Any) -> None:
        order.append(f"read {taken.step}")
        settle(run, report, taken)

    monkeypatch.setattr(loop, "update", do)
    monkeypatch.setattr(loop, "settle", read)
    return order
