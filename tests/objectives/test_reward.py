"""Oracles: numbers worked by hand, TRL's own loss on the same rewards, one step of TRL's RewardTrainer, and the
definition of each invariance."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_models import tiny_scorer
from tiny_runs import losses, same, tiny_job, write_pairs
from tunery.data.collate import collate
from tunery.data.loader import Cut, cut
from tunery.errors import ConfigError
from tunery.loop import run_job
from tunery.models.load import ModelConfig, load_model
from tunery.objectives.reward import Config, Objective
from tunery.policy import CausalPolicy
from tunery.read import read_data
from tunery.types import Tokens


class Given:
    """A policy that gives each sequence the value it is told."""

    def __init__(self, rewards_S: torch.Tensor):
        self.rewards_S = rewards_S

    def values(self, batch, at):
        assert at.tolist() == batch.ends_S.tolist()
        return self.rewards_S


def pair_tokens(count: int = 3, seed: int = 0, margins: tuple[float, ...] = (0.0, 0.5, 0.0)) -> list[list[Tokens]]:
    random = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        head = random.integers(3, 131, 12 + i)
        pair = []
        for _ in range(2):
            answer = random.integers(3, 131, random.integers(2, 8))
            weights = np.repeat([0.0, 1.0], [len(head), len(answer)]).astype(np.float32)
            pair.append(Tokens(np.concatenate([head, answer]).astype(np.int32), weights, {"margin": margins[i]}))
        pairs.append(pair)
    return pairs


def stream(pairs: list[list[Tokens]], share: bool = False):
    return collate([t for pair in pairs for t in pair], [i for i, _ in enumerate(pairs) for _ in "cr"], share=share)


def test_by_hand():
    """Rewards (2, 1), (0, 1), (-1, -4) with margins 0, 0.5, 0: differences 1, -1.5, 3."""
    rewards = torch.tensor([2.0, 1.0, 0.0, 1.0, -1.0, -4.0], dtype=torch.float64)
    batch = stream(pair_tokens())
    loss = Objective(Config()).loss(Given(rewards), batch)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(1.5)) + math.log1p(math.exp(-3))
    assert float(loss.sum) == pytest.approx(expected, abs=1e-9)
    assert float(Objective(Config()).weight(batch)) == 3.0
    found = {name: float(value) / weight for name, (value, weight) in loss.metrics.items()}
    assert found == pytest.approx({
        "loss": expected / 3, "rewards/chosen": 1 / 3, "rewards/rejected": -2 / 3, "rewards/accuracies": 2 / 3,
        "rewards/margins": 1.0, "rewards/mean": -1 / 6, "rewards/magnitude": 1.5,
    })  # fmt: skip
    centred = Objective(Config(center_rewards_coefficient=0.1)).loss(Given(rewards), batch)
    assert float(centred.sum) == pytest.approx(expected + 0.1 * (9 + 1 + 25), abs=1e-9)


@pytest.mark.parametrize("coefficient", [None, 0.01])
@pytest.mark.parametrize("margins", [True, False])
def test_the_loss_is_trls(coefficient, margins):
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    rewards = torch.randn(6, dtype=torch.float64, requires_grad=True)
    given = (0.3, 0.0, 1.5) if margins else (0.0, 0.0, 0.0)
    mine = Objective(Config(center_rewards_coefficient=coefficient)).loss(
        Given(rewards), stream(pair_tokens(margins=given))
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=coefficient), _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    ordered = torch.cat([rewards[0::2], rewards[1::2]])[:, None]

    def model(**_):
        return SimpleNamespace(logits=ordered)

    trainer.model = SimpleNamespace(training=True)
    inputs = {"attention_mask": torch.ones(6, 4)} | ({"margin": torch.tensor(given).double()} if margins else {})
    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    torch.testing.assert_close(mine.sum / 3, theirs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(x, rewards, retain_graph=True)[0] for x in (mine.sum / 3, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    for ours, name in (
        ("rewards/accuracies", "accuracy"),
        ("rewards/margins", "margin"),
        ("rewards/mean", "mean_reward"),
    ):
        value, weight = mine.metrics[ours]
        assert float(value) / weight == pytest.approx(trainer._metrics["train"][name][0], abs=1e-6)


def pair_job(folder: Path, **changes):
    write_pairs(folder / "pairs.jsonl", 24)
    write_pairs(folder / "held.jsonl", 6, start=1000)
    data = {"train": str(folder / "pairs.jsonl"), "eval": str(folder / "held.jsonl"), "cache": False}
    return tiny_job(folder, **{"objective": "reward", **changes, "data": {**data, **changes.get("data", {})}})


def test_a_step_is_trls(tmp_path):
    """All weights after one step of TRL's RewardTrainer on the same model and rows, padded, in float32."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tiny_job(tmp_path)  # makes the model folder
    start = tmp_path / "start"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    model.save_pretrained(start)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(start)
    job = pair_job(
        tmp_path, model={"name": str(start), "dtype": "float32"}, adapter="full", optimizer={"lr": 1e-2},
        schedule={"kind": "constant", "warmup": 0}, train={"max_steps": 1, "batch_size": 24}, data={"eval": None},
    )  # fmt: skip
    pairs = [read_data(job).data.train.sequences(i) for i in range(24)]
    rows = [{"chosen_ids": better.ids.tolist(), "rejected_ids": worse.ids.tolist()} for better, worse in pairs]
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=24, max_steps=1, learning_rate=1e-2,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    result = run_job(job)
    assert result.metrics["train_loss"] == pytest.approx(trainer.state.log_history[-1]["train_loss"], abs=1e-5)
    before, mine = load_file(start / "model.safetensors"), load_file(result.output / "model.safetensors")
    moved = 0.0
    for name, theirs in trainer.model.state_dict().items():
        # AdamW's first step is of the size lr in every number, whatever its gradient's size, so those that rounding
        # alone decides are left out
        sure = (theirs - before[name]).abs() > 0.99e-2
        torch.testing.assert_close(mine[name][sure], theirs[sure], rtol=0, atol=1e-4)
        moved = max(moved, float((mine[name] - before[name]).abs().max()))
        assert sure.float().mean() > 0.8 or "embed" in name
    assert moved > 5e-3


# ---------------------------------------------------------------- invariances, with a real model


def gradient(objective, policy, batches):
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = objective.loss(policy, batch).sum
        loss.backward()
        total += loss.item()
    assert sum(float(objective.weight(batch)) for batch in batches) == 3.0
    return total, [p.grad.clone() for p in policy.model.parameters()]


def test_a_step_is_the_same_however_it_is_cut():
    """float64: one stream, one a pair, several, over two ranks, and with the prompts shared, all give one gradient."""
    policy = CausalPolicy(tiny_scorer(), dtype=torch.float64)
    objective, pairs = Objective(Config(center_rewards_coefficient=0.02)), pair_tokens(seed=4)
    found = []
    for how in [
        [Cut(1000)], [Cut(50)], [Cut(1000, packing=False)], [Cut(40, rank=0, world=2), Cut(40, rank=1, world=2)],
    ]:  # fmt: skip
        found.append(gradient(objective, policy, [b for one in how for b in cut(pairs, [0, 1, 2], one)]))
    shared = stream(pairs, share=True)
    assert policy.shares and shared.continues and shared.n_tokens < stream(pairs).n_tokens
    found.append(gradient(objective, policy, [shared]))
    assert len(cut(pairs, [0, 1, 2], Cut(50))) > 1
    for number, (loss, grads) in enumerate(found[1:]):
        assert loss == pytest.approx(found[0][0], rel=1e-10)
        near = 1e-7 if number == 3 else 1e-12  # the library's norm is float32: gradients meet there that did not
        for mine, expected in zip(grads, found[0][1], strict=True):
            assert (mine - expected).abs().max() <= near * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
        {"adapter": {"kind": "lora", "rank": 4, "init": "pissa"}, "model": {"dtype": "float32"}},
        {"adapter": "full", "model": {"dtype": "bfloat16"}},
        {"adapter": {"kind": "freeze", "layers": 1, "cache": True}, "model": {"dtype": "float32"}},
    ],
    ids=["lora", "pissa", "full bf16", "freeze"],
)
def test_it_learns_and_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, changes):
    lr = {"lora": 1e-2, "full": 3e-3, "freeze": 1e-2}[getattr(changes["adapter"], "get", lambda _: "full")("kind")]
    job = pair_job(tmp_path, **changes, optimizer={"lr": lr}, train={"epochs": 4, "save_every": 4, "keep": 9})
    result = run_job(job)
    assert result.metrics["eval_rewards/accuracies"] > 0.8 and result.metrics["eval_loss"] < 0.6
    assert "eval_perplexity" not in result.metrics
    cut_off = tmp_path / "cut"
    shutil.copytree(job.output, cut_off)
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(cut_off / name)
    for name in ("all_results.json", "adapter_model.safetensors", "model.safetensors"):
        (cut_off / name).unlink(missing_ok=True)
    run_job(job.model_copy(update={"output": str(cut_off)}))
    assert losses(cut_off) == losses(job.output) and len(losses(cut_off)) == 12
    assert same(cut_off, Path(job.output))


@pytest.mark.parametrize("share", [True, False])
def test_the_plan_runs_it_on_shapes(tmp_path, share):
    from tunery.plan.command import plan_job

    plan = plan_job(pair_job(tmp_path, model={"dtype": "float32"}, train={"share_prompts": share}), "cpu")
    assert plan.notes == [] and plan.steps == 6
    head = 8 * 32 * 4  # far from a vocabulary's logits
    assert plan.memory.logits <= 64 * head and plan.trainable == 4096 + 32


def test_rows_that_are_no_pairs_and_options_that_could_do_nothing_are_refused(tmp_path):
    job = pair_job(tmp_path, data={"train": str(tmp_path / "train.jsonl")})
    with pytest.raises(Exception, match="no rejected answer"):
        run_job(job)
    with pytest.raises(ConfigError, match=r"eval\.generate"):
        run_job(pair_job(tmp_path, eval={"generate": 2}))


def test_it_goes_on_from_a_tuned_language_model(tmp_path):
    """An adapter of sft is a start for LoRA, which trains on, and for full, which merges it; the head is fresh."""
    sft = tiny_job(tmp_path, output=str(tmp_path / "sft"), train={"epochs": 1}, model={"dtype": "float32"})
    run_job(sft)
    for adapter in ({"kind": "lora", "rank": 4}, "full"):
        job = pair_job(
            tmp_path, adapter=adapter, model={"dtype": "float32", "init_from": sft.output},
            train={"max_steps": 1}, optimizer={"lr": 1e-9}, output=str(tmp_path / f"reward-{len(adapter)}"),
        )  # fmt: skip
        weights = load_file(
            run_job(job).output / ("model.safetensors" if adapter == "full" else "adapter_model.safetensors")
        )
        if adapter != "full":
            start = load_file(Path(sft.output) / "adapter_model.safetensors")
            name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
            torch.testing.assert_close(weights[name], start[name], rtol=0, atol=1e-6)
        else:
            base = load_model(ModelConfig(name=str(tmp_path / "model")), torch.float32).state_dict()
            name = "model.layers.0.self_attn.q_proj.weight"
            assert not torch.allclose(weights[name], base[name], atol=1e-4)
