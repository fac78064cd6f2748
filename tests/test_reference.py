"""Oracles: the policy as it was before anything moved; PEFT's own reading of the starting adapter; a run that was never
stopped; the other way to have the same reference."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunery.loop
from processes import runs_on_two_ranks
from tiny_runs import WORDS, losses, tiny_job
from tunery.config import build
from tunery.data.loader import Loader
from tunery.engine import Engine
from tunery.errors import ConfigError, NonFiniteError
from tunery.frozen import begin_step
from tunery.job import Job
from tunery.loop import run_job
from tunery.policy import REFERENCE, CausalPolicy
from tunery.read import read_data
from tunery.reference import FILES, START, keep_reference, rows_to_come
from tunery.resolve import resolve
from tunery.setup import Run, load_start, set_up

LN2 = math.log(2)
MODES = ("live", "cached")


def write_pairs(path: Path, count: int, start: int = 0) -> Path:
    """The better answer repeats the question's words backwards, the worse one in their order."""
    rows = []
    for i in range(start, start + count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * i % 9)]
        rows.append({
            "prompt": f"{i}: " + " ".join(words), "chosen": " ".join(reversed(words)),
            "rejected": " ".join([*words, words[0]]),
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_job(folder: Path, reference: str = "auto", **changes: Any) -> Job:
    for name, count, first in (("pairs", 20, 0), ("held_out", 6, 1000)):
        if not (folder / f"{name}.jsonl").is_file():
            write_pairs(folder / f"{name}.jsonl", count, first)
    data = {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "held_out.jsonl"), **changes.pop("data", {})}
    objective = {"kind": "dpo", "reference": reference, **changes.pop("objective", {})}
    changes["train"] = {"micro_tokens": 100, **changes.get("train", {})}
    return tiny_job(folder, data=data, objective=objective, **changes)


def set_up_run(job: Job) -> Run:
    """What run_job has before the reference comes."""
    engine = Engine(job.model.dtype)
    read = read_data(job)
    Path(job.output).mkdir(parents=True, exist_ok=True)
    return set_up(resolve(job, engine, read), engine, read, None)


def first_adapter(folder: Path, **adapter: Any) -> str:
    """An adapter that was trained before."""
    job = tiny_job(
        folder, adapter={"kind": "lora", "rank": 4, **adapter}, train={"max_steps": 3}, optimizer={"lr": 5e-2},
        output=str(folder / "first"),
    )  # fmt: skip
    run_job(job)
    return str(folder / "first")


def logps(run: Run, batch: Any) -> torch.Tensor:
    run.model.eval()
    with torch.no_grad():
        return run.policy.logps(batch)


ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether it starts from one trained before
    "lora": ({"kind": "lora", "rank": 4}, False),
    "rslora with dropout": ({"kind": "lora", "rank": 4, "rslora": True, "dropout": 0.5}, False),
    "dora": ({"kind": "lora", "rank": 4, "dora": True}, False),
    "pissa": ({"kind": "lora", "rank": 4, "init": "pissa"}, False),
    "modules to save": ({"kind": "lora", "rank": 4, "modules_to_save": ["norm"]}, False),
    "trained before": ({"kind": "lora", "rank": 4}, True),
    "trained before, dora and dropout": ({"kind": "lora", "rank": 4, "dora": True, "dropout": 0.3}, True),
    "full": ({"kind": "full"}, False),
    "full from an adapter": ({"kind": "full"}, True),
    "freeze": ({"kind": "freeze", "layers": 1}, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_is_the_start_whatever_has_moved_since(tmp_path, name, dtype, mode):
    adapter, before = ADAPTERS[name]
    model: dict[str, Any] = {"dtype": dtype}
    if before:
        model["init_from"] = first_adapter(tmp_path, dora=adapter.get("dora", False))
    run = set_up_run(pair_job(tmp_path, mode, adapter=adapter, model=model, output=str(tmp_path / "run")))
    assert isinstance(run.loader, Loader)
    then = [logps(run, batch) for batch in run.loader.step(0).micro]
    keep_reference(run)
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.1 * torch.randn_like(parameter)
    run.model.train()
    for batch, expected in zip(run.loader.step(0).micro, then, strict=True):
        assert (REFERENCE in batch.extra) == (mode == "cached")
        found = run.policy.reference_logps(batch)
        exact = dtype == "float64"
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if exact else 1e-5)
        assert run.model.training and not found.requires_grad
        assert (logps(run, batch) - expected).abs().max() > 1e-3
        run.model.train()


def answer_logp(model: Any, tokens: Any) -> float:
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return float((logps.gather(1, ids[1:, None])[:, 0] * torch.from_numpy(tokens.weights[1:])).sum())


@pytest.mark.parametrize("before", [False, True])
def test_the_reference_is_what_peft_reads(tmp_path, before):
    """And not the base, where the run starts from an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = {"init_from": first_adapter(tmp_path)} if before else {}
    run = set_up_run(pair_job(tmp_path, "live", model=model, output=str(tmp_path / "run")))
    keep_reference(run)
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"), dtype=torch.float64)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "first")) if before else base
    (batch, *_) = run.loader.step(0).micro
    found = batch.per_sequence(run.policy.reference_logps(batch))
    sequences = [tokens for row in dict.fromkeys(batch.rows) for tokens in run.data.train.sequences(row)]
    expected = [answer_logp(theirs, tokens) for tokens in sequences]
    with theirs.disable_adapter() if before else nullcontext():
        of_base = [answer_logp(theirs, tokens) for tokens in sequences]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)  # the library's norm is float32
    assert not before or np.abs(found.numpy() - of_base).max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_from_an_adapter_starts_at_ln_2(tmp_path, adapter, mode):
    """Margins are 0 at step 1, which they would not be against the base."""
    model = {"init_from": first_adapter(tmp_path)}
    job = pair_job(tmp_path, mode, model=model, adapter=adapter, train={"max_steps": 2}, output=str(tmp_path / "run"))
    run_job(job)
    lines = [json.loads(line) for line in (Path(job.output) / "trainer_log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(LN2, abs=1e-12) and first["rewards/margins"] == pytest.approx(0, abs=1e-12)
    assert lines[0]["eval_loss"] == pytest.approx(LN2, abs=1e-12) and lines[0]["rewards/margins"] == pytest.approx(0)
    assert losses(job.output)[1] != pytest.approx(LN2, abs=1e-4)


CHANGES: dict[str, dict[str, Any]] = {
    "lora with dropout": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}},
    "full": {"adapter": "full", "optimizer": {"lr": 1e-3}},
    "several losses": {"objective": {"loss": ["sigmoid", "ipo"], "sft_weight": 0.2, "ld_alpha": 0.5}},
    "float32": {"model": {"dtype": "float32"}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_cached_equals_live(tmp_path, name):
    found = {}
    for mode in ("live", "cached", "auto"):
        job = pair_job(tmp_path, mode, **CHANGES[name], output=str(tmp_path / mode))
        run_job(job)
        found[mode] = losses(job.output)
        text = (Path(job.output) / "report.md").read_text()
        assert ("were computed once" in text) == (mode != "live") and ("runs beside" in text) == (mode == "live")
        left = {path.name for path in Path(job.output).iterdir()}
        assert not left & {START, *FILES.values()}
    rel = 1e-4 if name == "float32" else 1e-9
    assert found["cached"] == pytest.approx(found["live"], rel=rel) and found["auto"] == found["cached"]
    assert len(found["live"]) == 6 and found["live"][-1] < found["live"][0]


class Killed(Exception):
    pass


def kill_before(step: int, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    def begin(run: Any, number: int) -> None:
        if number == step:
            raise Killed
        begin_step(run, number)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tunery.loop, "begin_step", begin)
        run_job(job)


@pytest.mark.parametrize(
    "gone", [(), tuple(FILES.values()), (START, *FILES.values())], ids=["there", "gone", "all gone"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["lora", "pissa", "full"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, monkeypatch, adapter, mode, gone):
    """The reference of the rest is that of the start, from its files or made again."""
    section = {"kind": "lora", "rank": 4, "init": adapter} if adapter == "pissa" else adapter
    steps = {"save_every": 1, "keep": None}
    whole, cut = (
        pair_job(tmp_path, mode, adapter=section, train=steps, eval={"best": False}, output=str(tmp_path / name))
        for name in ("whole", "cut")
    )
    run_job(whole)
    kill_before(4, monkeypatch, cut)
    for name in gone:
        (Path(cut.output) / name).unlink(missing_ok=True)
    passes = []
    live = CausalPolicy.reference_logps
    monkeypatch.setattr(
        CausalPolicy, "reference_logps", lambda self, b: (passes.append(REFERENCE in b.extra), live(self, b))[1]
    )
    run_job(cut)
    assert all(passes) == (mode == "cached" and not gone)  # whether no reference was computed
    assert losses(cut.output) == losses(whole.output) and len(losses(cut.output)) == 6


def test_a_resumed_run_may_take_the_other_way(tmp_path, monkeypatch):
    whole, cut = (pair_job(tmp_path, "live", train={"save_every": 1}, output=str(tmp_path / n)) for n in ("a", "b"))
    run_job(whole)
    kill_before(3, monkeypatch, cut)
    run_job(pair_job(tmp_path, "cached", train={"save_every": 1}, output=cut.output))
    assert losses(cut.output) == pytest.approx(losses(whole.output), rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_a_run_that_started_elsewhere_is_refused(tmp_path, mode):
    """Or the reference would be the base, silently. From the same start, another folder goes on as the first did."""
    begun = {"init_from": first_adapter(tmp_path)}
    train = {"save_every": 1, "keep": None}
    whole = pair_job(tmp_path, mode, model=begun, train=train, eval={"best": False}, output=str(tmp_path / "whole"))
    run_job(whole)
    resumed = {**train, "resume": str(tmp_path / "whole" / "checkpoint-4")}
    with pytest.raises(ConfigError, match=r"train\.resume.*started from other weights \(model\.init_from differ"):
        run_job(pair_job(tmp_path, mode, train=resumed, eval={"best": False}, output=str(tmp_path / "other")))
    same = pair_job(tmp_path, mode, model=begun, train=resumed, eval={"best": False}, output=str(tmp_path / "same"))
    run_job(same)
    assert losses(same.output) == losses(whole.output)[4:]


def test_only_the_rows_to_come_are_asked_for_and_each_once(tmp_path):
    """A short run; and a weighted mix, which shows rows several times."""
    run = set_up_run(pair_job(tmp_path, "cached", train={"max_steps": 1, "batch_size": 6}))
    keep_reference(run)
    found = np.load(Path(run.output) / FILES["train"])
    coming = set(run.loader.rows(0))
    for row in range(20):
        (spans,) = [run.data.train.spans(row)]
        values = np.concatenate([found[first:last] for first, last in spans])
        assert np.isnan(values).all() if row not in coming else (values <= 0).all() and (values < 0).any()
    shutil.rmtree(run.output)
    mix = [
        {"path": str(tmp_path / "pairs.jsonl"), "weight": 1.0},
        {"path": str(tmp_path / "held_out.jsonl"), "weight": 3.0},
    ]
    job = pair_job(tmp_path, "cached", data={"train": mix, "eval": None, "mix": "weighted"}, train={"epochs": 1})
    run = set_up_run(job)
    shown = run.data.train.index
    assert len(shown) > len(set(shown.tolist())) == len(rows_to_come(run))
    keep_reference(run)
    for batch in run.loader.step(0).micro:
        torch.testing.assert_close(batch.extra[REFERENCE], logps(run, batch), rtol=0, atol=1e-12)


def test_a_stream_has_its_reference_live(tmp_path):
    steps = {"max_steps": 3}
    data = {"streaming": True}
    run_job(pair_job(tmp_path, "auto", data=data, train=steps))
    assert "the data are streamed" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(ConfigError, match=r"objective\.reference.*streamed; set it to live"):
        run_job(pair_job(tmp_path, "cached", data=data, train=steps, output=str(tmp_path / "other")))


def test_without_room_on_the_disk_it_is_live(tmp_path, monkeypatch):
    monkeypatch.setattr("tunery.reference.DISK", 0.0)
    run_job(pair_job(tmp_path, "auto", train={"max_steps": 1}))
    assert "B free" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(ConfigError, match="set it to live"):
        run_job(pair_job(tmp_path, "cached", train={"max_steps": 1}, output=str(tmp_path / "other")))


def test_an_interrupted_pass_leaves_no_half_a_file(tmp_path, monkeypatch):
    job = pair_job(tmp_path, "cached", train={"max_steps": 2})
    live = CausalPolicy.reference_logps
    left = iter([False, True])

    def interrupted(self, batch):
        if next(left, False):
            raise KeyboardInterrupt
        return live(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CausalPolicy, "reference_logps", interrupted)
        run_job(job)
    assert not [path for path in (tmp_path / "run").iterdir() if "reference" in path.name]
    run_job(job)
    assert losses(job.output)[0] == pytest.approx(LN2)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_not_finite_can_be_replayed(tmp_path, mode):
    from tunery.replay import replay

    objective = {"loss": "discopop", "beta": 1e3}  # exp of a large margin
    job = pair_job(tmp_path, mode, objective=objective, adapter="full", optimizer={"lr": 0.3})
    with pytest.raises(NonFiniteError):
        run_job(job)
    lines = list(replay(Path(job.output)))
    then, now = (lines[1 : lines.index("now:")], lines[lines.index("now:") + 1 :])
    assert len(then) == len(now) and [a.strip().split(";")[0] for a in then] == [b.strip().split(";")[0] for b in now]


def test_the_start_is_made_again_as_it_was(tmp_path):
    """What `starting` does without its file: the same job loaded anew, not the weights that are there now."""
    job = pair_job(tmp_path, "live", adapter={"kind": "lora", "rank": 4, "init": "pissa"})
    run = set_up_run(job)
    again, _ = load_start(run.job, build("adapters", run.job.adapter), None, run.engine)
    for (name, mine), (_, other) in zip(run.model.named_parameters(), again.named_parameters(), strict=True):
        assert mine.equal(other), name


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    def jobs(ranks: str) -> list[Job]:
        train = {"epochs": 2, "batch_size": 7}
        return [pair_job(tmp_path, mode, train=train, output=str(tmp_path / f"{mode}-{ranks}")) for mode in MODES]

    for job in jobs("one"):
        run_job(job)
    status, text = runs_on_two_ranks(tmp_path, *jobs("two"))
    assert status == 0, text
    for mode in MODES:
        one, two = tmp_path / f"{mode}-one", tmp_path / f"{mode}-two"
        assert losses(two) == pytest.approx(losses(one), rel=1e-11)
        evaluations = [json.loads((run / "eval_results.json").read_text()) for run in (one, two)]
        for key, value in evaluations[0].items():
            assert "runtime" in key or value == pytest.approx(evaluations[1][key], rel=1e-9), key


def test_what_a_preference_run_leaves_to_be_read(tmp_path):
    """Rewards of the held-out pairs in every file, and no perplexity, which this loss has none of."""
    run_job(pair_job(tmp_path, train={"max_steps": 4}))
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= results.keys()
    assert "eval_perplexity" not in results
    report = (tmp_path / "run" / "report.md").read_text()
    assert "rewards/margins" in report and "perplexity" not in report
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    assert all("rewards/accuracies" in line for line in lines if "loss" in line or "eval_loss" in line)
