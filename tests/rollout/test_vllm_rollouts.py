"""Oracle: the same run answered by HFGenerator. The engine is a stand-in for vLLM 0.33.0 (stand_ins/vllm) that has no
weights but those it is given, and HFGenerator's random numbers; no real engine has made these runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rollouts import OBJECTIVES, job, lines, logged, weights, write_prompts

from processes import train, train_on_two_ranks
from tiny_runs import final_weights, losses, tiny_job
from tunery.devices import this_device
from tunery.errors import ConfigError, ModelError
from tunery.generate.vllm import VLLMGenerator
from tunery.loop import run_job
from tunery.plan.bill import make_plan
from tunery.plan.command import plan_job
from tunery.plan.planner import Planner
from tunery.read import read_data
from tunery.resolve import for_training, planned

STAND_INS = Path(__file__).resolve().parents[1] / "stand_ins"
ADAPTERS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
}


@pytest.fixture
def stand_in(monkeypatch):
    """The module `vllm`, in this test alone."""
    monkeypatch.syspath_prepend(str(STAND_INS))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def run(folder, generator, **changes):
    """A run of float32, by either generator, and its folder."""
    rollout = {"generator": generator, "minibatches": 2, **changes.pop("rollout", {})}
    model = {"dtype": "float32", **changes.pop("model", {})}
    run_job(job(folder, generator, rollout=rollout, model=model, **changes))
    return folder / generator


def completions(output):
    return [line["completion"] for line in lines(output)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_with_an_engine_of_its_own_equals_one_without(tmp_path, stand_in, name):
    """Answers to the letter, after steps that change them; losses and weights up to the rounding of what is merged."""
    held = str(write_prompts(tmp_path / "held.jsonl", 3, 20))
    changes = {
        "adapter": ADAPTERS[name], "objective": OBJECTIVES["dapo"], "rollout": {"temperature": 1.3},
        "data": {"train": str(write_prompts(tmp_path / "prompts.jsonl")), "eval": held},
        "eval": {"every": 2, "best": False}, "train": {"max_steps": 6}, "optimizer": {"lr": 3e-2},
    }  # fmt: skip
    mine, theirs = run(tmp_path, "vllm", **changes), run(tmp_path, "hf", **changes)
    assert completions(mine) == completions(theirs) and len(lines(mine)) == 12
    assert logged(mine, "eval_loss") == pytest.approx(logged(theirs, "eval_loss"), abs=1e-12)
    assert losses(mine) == pytest.approx(losses(theirs), rel=1e-3, abs=1e-5)
    assert max(logged(mine, "rollout/difference")) < 1e-5
    for key, value in final_weights(theirs).items():
        torch.testing.assert_close(final_weights(mine)[key], value, rtol=1e-2, atol=1e-4)
    (engine,) = stand_in.LOADED
    rollouts, evaluations = 3, 4
    assert engine.events == ["reload_weights", "generate"] * (rollouts + evaluations) + ["shutdown"]


def test_without_new_weights_in_each_rollout_it_is_another_run(tmp_path, stand_in, monkeypatch):
    """That the oracle above sees it: the first weights are sent, and no others."""
    changes = {"adapter": {"kind": "full"}, "train": {"max_steps": 6}, "optimizer": {"lr": 3e-2}}
    sync, sent = VLLMGenerator.sync, []

    def once(generator):
        if not sent:
            sent.append(generator)
            sync(generator)

    monkeypatch.setattr(VLLMGenerator, "sync", once)
    mine, theirs = run(tmp_path, "vllm", **changes), run(tmp_path, "hf", **changes)
    assert completions(mine)[:4] == completions(theirs)[:4]
    assert completions(mine)[4:8] != completions(theirs)[4:8]
    assert logged(mine, "rollout/difference")[0] < 1e-5 < 1e-3 < logged(mine, "rollout/difference")[2]


def test_an_engine_that_sleeps_answers_the_same(tmp_path, stand_in):
    changes = {"rollout": {"vllm_sleep": True, "resample": 1}, "train": {"max_steps": 4}}
    mine, theirs = (
        run(tmp_path, "vllm", **changes),
        run(tmp_path, "hf", rollout={"resample": 1}, train={"max_steps": 4}),
    )
    assert completions(mine) == completions(theirs)
    assert "sleep" in stand_in.LOADED[-1].events


def test_the_engine_ends_with_a_run_that_fails(tmp_path, stand_in):
    with pytest.raises(ModelError, match="vLLM does not take the weights"):
        stand_in.Worker.reload_weights = lambda self, **_: 1 / 0
        run(tmp_path, "vllm")
    assert stand_in.LOADED[-1].events == ["reload_weights", "shutdown"]


@pytest.mark.slow
def test_two_ranks_with_an_engine_each_take_the_same_steps_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_INS), os.environ.get("PYTHONPATH", "")]))
    made = job(tmp_path, "one", rollout={"generator": "vllm", "minibatches": 2}, model={"dtype": "float32"})
    path = tmp_path / "job.json"
    path.write_text(json.dumps(made.model_dump(mode="json")))
    train(path)
    status, text = train_on_two_ranks(path, f"output={tmp_path / 'two'}")
    assert status == 0, text
    assert completions(tmp_path / "two") == completions(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-5)
    for key, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, weights(tmp_path / "one")[key], rtol=1e-2, atol=1e-4)


# ---------------------------------------------------------------- before the model loads


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("tunery.setup.load_start", lambda *_: pytest.fail("the model was loaded"))


def test_a_missing_vllm_is_named_before_anything_is_read(tmp_path, no_model, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    monkeypatch.setattr("tunery.read.prepare", lambda *_, **options: pytest.fail("the rows were read"))
    with pytest.raises(ConfigError, match=r"rollout.generator: vllm is not installed.* pip install 'tunery\[vllm\]'"):
        run(tmp_path, "vllm", data={"train": str(tmp_path / "prompts.jsonl")})
    assert not (tmp_path / "vllm" / "tunery.yaml").exists()


BAD = {
    "dtype": ({"model": {"dtype": "float64"}}, "model.dtype: float64, but vLLM computes in"),
    "probabilities": (
        {"rollout": {"temperature": 0.7, "top_k": 5}, "model": {"dtype": "float32"}},
        "rollout.temperature: 0.7 with top_k or top_p",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_vllm_cannot_do_is_said_before_the_model_loads(tmp_path, stand_in, no_model, name):
    changes, message = BAD[name]
    rollout = {"generator": "vllm", **changes.get("rollout", {})}
    with pytest.raises(ConfigError, match=message):
        run_job(job(tmp_path, **{**changes, "rollout": rollout}))


def test_an_engine_for_another_device_is_refused_before_the_model_loads(tmp_path, stand_in, no_model, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform.device_type", "cuda")
    with pytest.raises(ConfigError, match="the policy trains on cpu, and the vllm that is installed is for cuda"):
        run(tmp_path, "vllm")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("changes", "left"), [({}, 0.6), ({"vllm_sleep": True}, 1.0), ({"generator": "hf"}, 1.0)])
def test_what_the_engine_holds_is_not_planned_for_training(tmp_path, changes, left):
    made = job(tmp_path, rollout={"generator": "vllm", "vllm_memory": 0.4, **changes})
    device = replace(this_device("cpu"), memory=1000)
    assert for_training(device, made).memory == 1000 * left
    without_rollouts = tiny_job(tmp_path, rollout={"generator": "vllm", "vllm_memory": 0.4, **changes})
    assert for_training(device, without_rollouts).memory == 1000


def test_an_engine_that_wakes_must_fit_beside_what_training_keeps(tmp_path, stand_in):
    """The device is as large as training needs, so an engine of nine tenths of it has no room."""
    rollout = {"generator": "vllm", "vllm_sleep": True, "vllm_memory": 0.9}
    made = job(tmp_path, rollout=rollout, adapter={"kind": "full"}, model={"dtype": "float32"})
    read, device = read_data(made), this_device("cpu")
    asked, rows = planned(made, read)
    alone = make_plan(Planner(asked, rows, device))
    kept = alone.memory.weights + alone.memory.optimizer + device.overhead
    for memory, fits in ((alone.memory.total + 1, False), (11 * kept, True)):
        there = Planner(asked, rows, replace(device, memory=memory))
        plan = make_plan(there, (alone.micro_tokens, alone.checkpointing))
        assert plan.memory.total <= memory and plan.fits == fits
    assert read.rewards is not None
    read.rewards.close()


def test_a_run_from_other_weights_has_an_engine_of_their_shape(tmp_path, stand_in):
    """Other rotary frequencies fit every tensor; only the answers would show them."""
    job(tmp_path)  # makes the model
    other = shutil.copytree(tmp_path / "model", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 50.0}
    (other / "config.json").write_text(json.dumps(config))
    changes = {"model": {"init_from": str(other)}, "train": {"max_steps": 2}}
    mine, theirs = run(tmp_path, "vllm", **changes), run(tmp_path, "hf", **changes)
    assert completions(mine) == completions(theirs)
    assert max(logged(mine, "rollout/difference")) < 1e-5


def test_a_plan_says_what_the_engine_takes(tmp_path, stand_in):
    made = job(tmp_path, rollout={"generator": "vllm", "vllm_memory": 0.5}, model={"dtype": "float32"})
    alone = plan_job(job(tmp_path), device="t4")
    plan = plan_job(made, device="t4")
    assert plan.device_memory == alone.device_memory // 2
    assert plan.notes[0] == "50% of the device's memory is vLLM's (rollout.vllm_memory) and not in what this has"


def test_a_probe_would_take_the_engines_memory_for_trainings(tmp_path):
    with pytest.raises(ConfigError, match="--probe: cannot tell vLLM's memory"):
        plan_job(job(tmp_path, rollout={"generator": "vllm"}), probing=True)
