"""Oracles: the evaluation that had all the memory it wanted, and one example at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from test_fallback import report_of
from tiny_runs import tiny_job
from tunery.checkpoint import load_state
from tunery.data.loader import Cut, evaluation_steps
from tunery.engine import Engine
from tunery.errors import OutOfMemoryError
from tunery.evaluate.loss import evaluate
from tunery.loop import run_job
from tunery.objectives import sft
from tunery.read import read_data
from tunery.resolve import resolve
from tunery.setup import set_up


def limit_evaluations(monkeypatch: Any, tokens: int) -> list[int]:
    """Memory for streams of so many tokens; returns the tokens of each that was tried."""
    plain, seen = sft.Objective.loss, []

    def loss(self: Any, policy: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.append(batch.n_tokens)
            if batch.n_tokens > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, policy, batch)

    monkeypatch.setattr(sft.Objective, "loss", loss)
    return seen


@pytest.fixture
def run(tmp_path):
    engine = Engine("float64")
    job = tiny_job(tmp_path, train={"micro_tokens": 4096, "checkpointing": "none"})
    read = read_data(job)
    return set_up(resolve(job, engine, read), engine, read, None)


def held_out(run: Any, cut: Cut, on_fall: Any = lambda how: None) -> dict[str, float]:
    return evaluate(
        run.objective, run.policy, run.model, evaluation_steps(run.data.eval, cut), run.engine, on_fall=on_fall
    )


def test_smaller_streams_give_the_same(run, monkeypatch):
    whole = held_out(run, run.cut)
    assert held_out(run, replace(run.cut, packing=False)) == pytest.approx(whole, rel=1e-12)
    longest = int(run.data.eval.lengths.max())
    seen, falls = limit_evaluations(monkeypatch, longest), []
    assert held_out(run, run.cut, falls.append) == pytest.approx(whole, rel=1e-12)
    assert max(seen) > longest and falls[-1].budget == longest
    assert [how.budget for how in falls] == sorted({how.budget for how in falls}, reverse=True)


def test_an_example_that_is_too_long_is_said(run, monkeypatch):
    longest = int(run.data.eval.lengths.max())
    limit_evaluations(monkeypatch, longest - 1)
    with pytest.raises(OutOfMemoryError, match=rf"in an evaluation, .*\(the longest has {longest}\)"):
        held_out(run, run.cut)


def test_a_run_goes_on_with_smaller_evaluations_and_the_same_steps(tmp_path, monkeypatch):
    plain = tiny_job(tmp_path, train={"micro_tokens": 4096}, eval={"every": 2}, output=str(tmp_path / "plain"))
    whole = run_job(plain)
    longest = 80
    seen = limit_evaluations(monkeypatch, longest)
    limited = run_job(plain.model_copy(update={"output": str(tmp_path / "limited")}))
    assert limited.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-12)
    too_large = [number for number, tokens in enumerate(seen) if tokens > longest]
    assert too_large and too_large == list(range(len(too_large)))  # later evaluations begin with what fits
    assert "memory ran out in an evaluation" in report_of(limited.output)
    newest = max(limited.output.glob("checkpoint-*"))
    assert load_state(newest)["fallen_to"] is None  # training went on as it was
