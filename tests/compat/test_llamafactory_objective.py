"""LLaMA-Factory's stages dpo, kto and rm. Oracles: what its options mean, and what its own trainer (0.9.5, with TRL
0.24) makes of the same log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tunery.compat.llamafactory import convert
from tunery.config import build
from tunery.data.collate import collate
from tunery.errors import ConfigError
from tunery.job import Job, load_job
from tunery.types import Batch, Tokens

SMALL = {"model_name_or_path": "builtin:tiny", "do_train": True, "dataset": "mine", "template": "qwen"}


def job(**values: Any) -> Job:
    return load_job(convert({**SMALL, **values}).config)


def objective(**values: Any) -> dict[str, Any]:
    """What differs from our defaults, with its kind."""
    return job(**values).objective.model_dump(exclude_unset=True)


def notes(**values: Any) -> str:
    return "\n".join(convert({**SMALL, **values}).notes)


def problem(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        convert({**SMALL, **values})
    return str(caught.value)


# ---------------------------------------------------------------- numbers

LENGTHS = [(2, 4), (4, 2)]  # tokens of the chosen and the rejected answer of two pairs
POLICY = [-3.0, -6.0, -5.0, -4.0]  # log-probabilities of the four answers
REFERENCE = [-4.0, -5.0, -4.5, -4.25]
# Losses of the two pairs as LLaMA-Factory's trainer computes them, with pref_beta 0.3.
THEIRS = [
    ({}, [0.437488, 0.811962]),
    ({"dpo_label_smoothing": 0.2}, [0.557488, 0.766962]),
    ({"pref_ftx": 0.5}, [1.187488, 1.436962]),
    ({"pref_bco_weight": 0.25}, [0.57175, 0.949978]),
    ({"pref_ftx": 0.5, "pref_bco_weight": 0.25}, [1.32175, 1.574978]),
    ({"pref_loss": "orpo"}, [1.707944, 1.348744]),
    ({"pref_loss": "simpo"}, [0.974077, 0.840071]),
    ({"pref_loss": "simpo", "pref_ftx": 0.5}, [1.724077, 1.465071]),
]


class Given:
    """A policy that says what it is given: each answer's log-probability, spread evenly over its tokens."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def logps(self, batch: Batch) -> torch.Tensor:
        return self._spread(POLICY)

    def reference_logps(self, batch: Batch) -> torch.Tensor:
        return self._spread(REFERENCE)

    def _spread(self, sums_S: list[float]) -> torch.Tensor:
        lengths_S = self.batch.labelled_S
        each_N = (torch.tensor(sums_S, dtype=torch.float64) / lengths_S).repeat_interleave(lengths_S)
        return torch.zeros(self.batch.n_tokens, dtype=torch.float64).index_put((self.batch.labelled_N,), each_N)


@pytest.mark.parametrize(("options", "losses"), THEIRS, ids=str)
def test_losses_are_theirs(options, losses):
    sequences = [
        Tokens(np.arange(3, 6 + n, dtype=np.int32), np.repeat([0.0, 1.0], [3, n]).astype(np.float32))
        for pair in LENGTHS
        for n in pair
    ]
    batch = collate(sequences, [0, 0, 1, 1])
    ours = build("objectives", job(stage="dpo", pref_beta=0.3, **options).objective)
    policy: Any = Given(batch)
    if getattr(ours, "observe", None) is not None:
        ours.take_in({name: (float(a), float(b)) for name, (a, b) in ours.observe(policy, batch).items()})
    assert float(ours.loss(policy, batch).sum) == pytest.approx(sum(losses), abs=5e-6)
    assert float(ours.weight(batch)) == 2.0


# ---------------------------------------------------------------- meaning


def test_defaults_of_each_stage():
    assert objective(stage="dpo") == {"kind": "dpo", "loss": ["sigmoid"], "beta": 0.1}
    assert objective(stage="rm") == {"kind": "reward"}
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert objective(stage="kto") == {"kind": "kto", "beta": 0.1, **weights}
    assert "sequence classification" in notes(stage="rm")


def test_relatives_of_fine_tuning():
    assert objective(use_dft_loss=True) == {"kind": "sft", "train_on": "answers", "loss": "dft"}
    assert objective(mask_history=True) == {"kind": "sft", "train_on": "last"}


def test_losses_by_name():
    assert objective(stage="dpo", pref_loss="hinge")["loss"] == ["hinge"]
    assert objective(stage="dpo", pref_loss="ipo", pref_beta="5e-1") == {"kind": "dpo", "loss": ["ipo"], "beta": 0.5}
    assert objective(stage="dpo", pref_loss="orpo") == {"kind": "orpo", "beta": 0.1}
    assert objective(stage="dpo", pref_loss="simpo") == {"kind": "simpo", "beta": 0.1, "gamma": 0.5}
    assert objective(stage="dpo", pref_loss="kto_pair") == {"kind": "kto", "beta": 0.1}
    assert objective(stage="dpo", ld_alpha=0.5)["ld_alpha"] == 0.5
    kto = objective(stage="kto", kto_chosen_weight=2, kto_rejected_weight=0.5, pref_ftx=0.1)
    assert (kto["desirable_weight"], kto["undesirable_weight"], kto["sft_weight"]) == (2.0, 0.5, 0.1)
    mixed = objective(stage="dpo", pref_bco_weight=0.25)
    assert (mixed["loss"], mixed["loss_weights"]) == (["sigmoid", "bco_pair"], [0.8, 0.2])
    for loss in ("hinge", "ipo"):
        assert "takes sigmoid" in notes(stage="dpo", pref_loss=loss)
    assert "the paper's way" in notes(stage="dpo", pref_loss="kto_pair")


def test_what_does_not_go_together_is_refused_by_name():
    assert "did you mean 'sigmoid'?" in problem(stage="dpo", pref_loss="sigmoidd")
    assert "dpo_label_smoothing: is for pref_loss: sigmoid" in problem(
        stage="dpo", pref_loss="ipo", dpo_label_smoothing=0.1
    )
    for loss, name in (("orpo", "pref_ftx"), ("orpo", "ld_alpha"), ("simpo", "ld_alpha"), ("ipo", "pref_bco_weight")):
        assert f"{name}: 0.5 is not in Tunery; nearest: " in problem(stage="dpo", pref_loss=loss, **{name: 0.5})
    for name in ("pref_ftx", "pref_bco_weight", "ld_alpha"):
        assert f"{name}: 0.5 is not in Tunery" in problem(stage="dpo", pref_loss="kto_pair", **{name: 0.5})


def test_options_of_other_stages_are_mentioned():
    text = notes(pref_beta=0.1, kto_chosen_weight=1.0, ref_model="x", reward_model="y", top_p=0.5)
    for line in ("pref_beta: ignored; no effect without stage: dpo or kto",
                 "kto_chosen_weight: ignored; no effect without stage: kto",
                 "ref_model: ignored; no effect without stage: dpo or kto or ppo",
                 "reward_model: ignored; no effect without stage: ppo",
        "top_p: ignored; no effect without stage: ppo"):  # fmt: skip
        assert line in text.splitlines()
    assert "pref_beta" not in notes(stage="dpo", pref_beta=0.1)
    assert "pref_bco_weight: ignored" in notes(stage="dpo", pref_loss="orpo", pref_bco_weight=0.5)


def test_the_reference_is_the_start_or_refused(tmp_path):
    adapter = str(tmp_path)
    assert objective(stage="dpo", ref_model="builtin:tiny") == objective(stage="dpo")
    started = {"stage": "dpo", "adapter_name_or_path": adapter}
    convert({**SMALL, **started, "ref_model": "builtin:tiny", "ref_model_adapters": adapter + "/"})
    assert "this adapter as the run finds it" in notes(**started)
    for values in (
        {"ref_model": "other/model"},
        {**started, "ref_model": "builtin:tiny"},
        {"ref_model": "builtin:tiny", "ref_model_adapters": adapter},
    ):
        text = problem(**{"stage": "dpo", **values})
        assert "is not what training starts from" in text and "leave ref_model out" in text
    assert "ref_model: ignored; pref_loss: simpo" in notes(stage="dpo", pref_loss="simpo", ref_model="other/model")
    assert "ref_model_adapters: ignored; no effect without ref_model" in notes(stage="kto", ref_model_adapters=adapter)


def test_dropout_is_off_where_it_is_there():
    for stage, expected in (("dpo", 0.0), ("kto", 0.0), ("rm", 0.1), ("sft", 0.1)):
        assert job(stage=stage, lora_dropout=0.1).adapter.dropout == expected  # type: ignore[attr-defined]
    assert "lora_dropout: 0, as" in notes(stage="dpo", lora_dropout=0.1)
    assert "changes nothing but speed" in notes(stage="dpo", packing=True)


def test_ppo(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = job(
        stage="ppo", reward_model="runs/reward", ppo_buffer_size=2, ppo_epochs=3, ppo_score_norm=True, max_steps=10,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, save_steps=5, logging_steps=1, warmup_steps=2,
        max_new_tokens=64, top_k=0, top_p=0.9,
    )  # fmt: skip
    ppo = result.objective.model_dump()
    assert (ppo["kind"], ppo["beta"], ppo["kl_target"], ppo["score_norm"]) == ("ppo", 0.2, 6.0, True)
    assert (ppo["gae_lambda"], ppo["gamma"], ppo["clip_low"], ppo["value_clip"]) == (0.95, 1.0, 0.2, 0.2)
    assert (ppo["value_weight"], ppo["kl_horizon"], ppo["whiten_rewards"]) == (0.1, 10000, False)
    assert [(reward.kind, reward.target) for reward in result.rewards] == [("model", "runs/reward")]  # type: ignore
    rollout = result.rollout
    assert (rollout.group, rollout.minibatches, rollout.iterations, rollout.max_new_tokens) == (1, 2, 3, 64)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (0.95, 0.9, 0)
    train = result.train  # its steps are rollouts of 16 prompts, each 6 optimizer steps
    assert (train.batch_size, train.max_steps, train.save_every, train.log_every) == (16, 60, 30, 6)
    assert result.schedule.warmup == 12
    quiet = {"max_steps": 10, "logging_steps": 1}
    assert "reward_model: is required" in problem(stage="ppo")
    merged = job(
        stage="ppo", reward_model_type="full", reward_model="some/base", reward_model_adapters="runs/reward", **quiet
    ).rewards  # type: ignore
    assert [(reward.kind, reward.target) for reward in merged] == [("model", "runs/reward")]  # type: ignore
    url = "http://localhost:8000/v1/score/evaluation"
    (asked,) = job(stage="ppo", reward_model_type="api", reward_model=url, **quiet).rewards  # type: ignore
    assert (asked.kind, asked.url, asked.protocol) == ("endpoint", url, "llamafactory")  # type: ignore
    assert "reward_model: the server is asked" in notes(stage="ppo", reward_model_type="api", reward_model=url, **quiet)
    for kind, model in (("api", "runs/reward"), ("lora", url), ("full", url)):
        text = problem(stage="ppo", reward_model_type=kind, reward_model=model, **quiet)
        assert "an address goes with api, and only it" in text
    for name, value in (
        ("do_sample", False),
        ("num_beams", 4),
        ("repetition_penalty", 1.1),
    ):
        text = problem(**{"stage": "ppo", "reward_model": "x", name: value})
        assert f"{name}: " in text and "is not in Tunery; nearest: " in text
