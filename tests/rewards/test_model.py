"""Oracles: the reward model loaded by itself, bit for bit, whose weights are counted; and the run without sharing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, safe_open

from tiny_models import FAMILIES
from tiny_runs import losses, model_folder, same, tiny_job, write_pairs
from tunery.adapters import lora
from tunery.config import build
from tunery.errors import ConfigError, ModelError
from tunery.generate.score import RewardModel
from tunery.loop import run_job
from tunery.models.load import ModelConfig, load_model
from tunery.models.parts import unwrap
from tunery.models.score import load_with_head
from tunery.models.shared_base import NotShared, same_base, scorer_on
from tunery.rewards import Host
from tunery.rewards.model import Config, Reward
from tunery.types import Answer, Message

TALKS = {"One thing?": "One.", "And then?": "二", "Long " * 9: "Yes, a longer answer.", "?": ""}
ANSWERS = [Answer([Message("user", question)], text, [1], "stop") for question, text in TALKS.items()]


def stirred(model, seed: int):
    """What trains in it, moved."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model


def reward_adapter(folder: Path, base: Path, **options) -> Path:
    """An adapter of a reward model on `base` with updates and a head that are not zero."""
    ours = lora.Adapter(lora.Config(rank=3, **options))
    wrapped = stirred(ours.apply(load_with_head("score", ModelConfig(name=str(base)), torch.float32, seed=1)), 3)
    ours.save(wrapped, folder, str(base))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    model_folder(folder / "model")
    reward_adapter(folder / "reward", folder / "model")
    return folder


def policy_on(base: Path, dtype: torch.dtype = torch.float32, **options):
    model = load_model(ModelConfig(name=str(base)), dtype)
    return stirred(lora.Adapter(lora.Config(**{"rank": 2, **options})).apply(model), 7)


def host(base: Path, changed: str | None = None, **options) -> Host:
    return Host(policy_on(base, **options), ModelConfig(name=str(base)), changed)


def storages(model) -> dict[int, int]:
    """Bytes of each tensor's memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def config(place: Path, **options) -> Config:
    return Config(target=str(place / "reward"), **options)


# ---------------------------------------------------------------- the weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"targets": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}, {"dora": True}],
    ids=["lora", "embeddings too", "embeddings whole", "dora"],
)
def test_scores_are_those_of_a_model_of_its_own_and_weights_are_there_once(place, dtype, options):
    there = host(place / "model", dtype=dtype, **options)
    reward = Reward(config(place))
    notes = reward.load(there)
    assert len(notes) == 1 and "on the policy's own base weights, which are in memory once" in notes[0]
    assert reward.model is not None
    assert reward.score(ANSWERS) == RewardModel(place / "reward", dtype=dtype).score(
        [[*a.prompt, Message("assistant", a.text)] for a in ANSWERS]
    )
    mine, policys = storages(reward.model.policy.model), storages(there.model)
    base = storages(unwrap(load_model(ModelConfig(name=str(place / "model")), dtype)))
    own = sum(size for pointer, size in mine.items() if pointer not in policys)
    adapter = sum(t.numel() * t.element_size() for t in load_file(place / "reward/adapter_model.safetensors").values())
    head = 32 * torch.promote_types(dtype, torch.float32).itemsize
    assert sum(size for pointer, size in mine.items() if pointer in policys) >= sum(base.values()) - head
    assert own <= (2 if dtype == torch.float64 else 1) * adapter + head  # the head under its trained copy


def test_nothing_of_it_is_in_the_policy_and_the_policy_is_what_it_was(place):
    there = host(place / "model")
    ids = torch.arange(5, 25)[None]
    names, before = [name for name, _ in there.model.named_parameters()], there.model(input_ids=ids).logits
    trained = [p for p in there.model.parameters() if p.requires_grad]
    reward = Reward(config(place))
    reward.load(there)
    reward.score(ANSWERS)
    assert [name for name, _ in there.model.named_parameters()] == names
    assert [p for p in there.model.parameters() if p.requires_grad] == trained
    assert reward.model is not None
    assert [n for n, p in reward.model.policy.model.named_parameters() if p.requires_grad] == []
    assert there.model(input_ids=ids).logits.equal(before)


def test_scores_do_not_move_with_the_policy(place):
    there = host(place / "model")
    reward = Reward(config(place))
    reward.load(there)
    first = reward.score(ANSWERS)
    stirred(there.model, 11)
    assert reward.score(ANSWERS) == first


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "mixtral", "phi3", "bloom", "falcon"])
def test_other_families(tmp_path, family):
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, name)(**options)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "model")
    source = ModelConfig(name=str(tmp_path / "model"))
    ours = lora.Adapter(lora.Config(rank=2))
    wrapped = stirred(ours.apply(load_with_head("score", source, torch.float32, seed=1)), 3)
    ours.save(wrapped, tmp_path / "reward", str(tmp_path / "model"))
    policy = policy_on(tmp_path / "model")
    from tunery.models.target import load_adapter, load_base, resolve_target

    shared = load_adapter(scorer_on(policy, source), tmp_path / "reward").eval()
    (tmp_path / "reward/tokenizer.json").write_text("{}")
    alone = load_adapter(load_base(resolve_target(tmp_path / "reward"), torch.float32), tmp_path / "reward").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert shared(input_ids=ids).logits.equal(alone(input_ids=ids).logits)
    own = [n for n, p in shared.named_parameters() if p.data_ptr() not in storages(policy)]
    assert own and all(".lora_" in n or ".score." in n for n in own)


# ---------------------------------------------------------------- and where they cannot be shared


def test_a_copy_of_its_own_where_the_base_is_not_the_same_any_more(place):
    alone = RewardModel(place / "reward", dtype="float32").score(
        [[*a.prompt, Message("assistant", a.text)] for a in ANSWERS]
    )
    thawed = host(place / "model")
    unwrap(thawed.model).get_decoder().norm.weight.requires_grad_(True)
    cases = {
        "PiSSA": host(place / "model", changed="PiSSA takes the adapter's start out of the base"),
        "trains some of the base's own weights": thawed,
        "it is to compute in float32 and the policy's base is in float64": host(place / "model", dtype=torch.float64),
    }
    for why, there in cases.items():
        reward = Reward(config(place, dtype="float32"))
        (note,) = reward.load(there)
        assert "on a copy of the base of its own, because" in note and why in note
        assert reward.score(ANSWERS) == alone
        assert not storages(reward.model.policy.model).keys() & storages(there.model).keys()  # type: ignore[union-attr]


def test_an_adapter_with_biases_leaves_the_policys_alone(tmp_path):
    """PEFT puts them into the base in place."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

    source = model_folder(tmp_path / "model")
    config = Qwen2Config(**{
        **AutoConfig.from_pretrained(source).to_dict(), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]
    })  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(source)
    policy = host(source)
    scorer = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
    trained = get_peft_model(scorer, LoraConfig(task_type="SEQ_CLS", bias="lora_only", target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("bias"):
                parameter += 1.0
    trained.save_pretrained(tmp_path / "reward")
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    reward = Reward(Config(target=str(tmp_path / "reward")))
    (note,) = reward.load(policy)
    assert "its adapter has biases of the base" in note
    assert all(p.equal(before[name]) for name, p in policy.model.named_parameters())


def test_another_base_is_nothing_to_tell(place, tmp_path):
    other = model_folder(tmp_path / "other")
    reward = Reward(config(place))
    assert reward.load(host(other)) == []
    one, two = ModelConfig(name=str(other)), ModelConfig(name=str(other) + "/")
    assert same_base(one, two) and not same_base(one, ModelConfig(name=str(place / "model")))
    hub = ModelConfig(name="some/model", revision="main")
    assert same_base(hub, ModelConfig(name="some/model"))
    assert not same_base(hub, ModelConfig(name="some/model", revision="v2"))


def test_a_policy_of_another_make_is_refused(place):
    policy = policy_on(place / "model")
    unwrap(policy).get_decoder().layers[0].mlp = torch.nn.Identity()
    with pytest.raises(NotShared, match="Identity stands where LlamaMLP does"):
        scorer_on(policy, ModelConfig(name=str(place / "model")))


def test_what_is_no_reward_model_is_said_before_anything_loads(place):
    with pytest.raises(ConfigError, match="needs a target"):
        build("rewards", Config())
    with pytest.raises(ModelError, match="language model, which scores nothing"):
        build("rewards", Config(target=str(place / "model")))
    with pytest.raises(ModelError, match="no such folder"):
        build("rewards", Config(target=str(place / "rewart")))


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model that objective reward trained, on the base that the policy will have."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_job(folder)
    pairs = write_pairs(folder / "pairs.jsonl", 16)
    run_job(tiny_job(
        folder, data={"train": str(pairs), "eval": None}, objective="reward", model={"dtype": "float32"},
        train={"epochs": 4}, output=str(folder / "reward"),
    ))  # fmt: skip
    prompts = [{"messages": [json.loads(line)["prompt"][0]]} for line in pairs.read_text().splitlines()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def ppo(folder: Path, output: str, **changes):
    values = {
        "data": {"train": str(folder / "prompts.jsonl"), "eval": None},
        "objective": {"kind": "ppo", "beta": 0.05, "score_norm": True},
        "rewards": [{"kind": "model", "target": str(folder / "reward")}],
        "rollout": {"group": 1, "max_new_tokens": 8, "minibatches": 2}, "adapter": {"kind": "lora", "rank": 4},
        "model": {"dtype": "float32"}, "output": str(folder / output),
        **changes,
        "train": {"batch_size": 4, "max_steps": 5, "save_every": 1, "keep": None, **changes.get("train", {})},
    }  # fmt: skip
    return tiny_job(folder, **values)


def console() -> Console:
    return Console(file=io.StringIO(), width=400)


def rewards_of(output: Path) -> list[float]:
    return [json.loads(line)["rewards"]["model"] for line in (output / "rollouts.jsonl").read_text().splitlines()]


def test_a_run_is_that_with_a_reward_model_of_its_own_and_leaves_nothing_of_it(trained, monkeypatch):
    said = console()
    run_job(ppo(trained, "shared"), said)
    assert "which are in memory once" in said.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr("tunery.models.shared_base.same_base", lambda one, other: False)
    run_job(ppo(trained, "apart"))
    shared, apart = trained / "shared", trained / "apart"
    assert same(shared, apart) and losses(shared) == losses(apart)
    assert rewards_of(shared) == rewards_of(apart) and len(set(rewards_of(shared))) > 5
    for folder in (shared, shared / "checkpoint-3"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "score" in name]  # noqa: SIM118
    sizes = [{f.name: f.stat().st_size for f in (run / "checkpoint-3").iterdir()} for run in (shared, apart)]
    assert sizes[0] == sizes[1]
    scored = [json.loads(line) for line in (shared / "rollouts.jsonl").read_text().splitlines()]
    talks = [[Message("user", s["prompt"][0]["content"]), Message("assistant", s["completion"])] for s in scored]
    assert RewardModel(trained / "reward", dtype="float32").score(talks) == pytest.approx(rewards_of(shared), abs=1e-5)


def test_a_resumed_run_equals_one_that_was_never_stopped(trained):
    run_job(ppo(trained, "whole"))
    whole, cut = trained / "whole", trained / "cut"
    shutil.copytree(whole, cut)
    for step in (4, 5):
        shutil.rmtree(cut / f"checkpoint-{step}")
    for name in ("all_results.json", "adapter_model.safetensors"):
        (cut / name).unlink()
    run_job(ppo(trained, "cut"))
    assert same(whole, cut) and losses(whole) == losses(cut) and rewards_of(whole) == rewards_of(cut)


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ({"kind": "lora", "rank": 4, "init": "pissa"}, "PiSSA takes the adapter's start out of the policy's"),
        ("full", "adapter: full trains the base itself"),
    ],
    ids=["pissa", "full"],
)
def test_a_run_that_changes_its_base_says_so_and_scores_with_another(trained, adapter, why):
    said, name = console(), why[:5]
    run_job(ppo(trained, name, adapter=adapter, train={"max_steps": 2}), said)
    assert f"on a copy of the base of its own, because {why}" in said.file.getvalue()  # type: ignore[attr-defined]
    scored = [json.loads(line) for line in (trained / name / "rollouts.jsonl").read_text().splitlines()]
    talks = [[Message("user", s["prompt"][0]["content"]), Message("assistant", s["completion"])] for s in scored]
    found = RewardModel(trained / "reward", dtype="float32").score(talks)
    assert found == pytest.approx(rewards_of(trained / name), abs=1e-5)


def test_a_plan_counts_what_is_its_own(place):
    from tunery.plan.command import plan_job
    from tunery.plan.rewards import reward_bytes

    write_pairs(place / "pairs.jsonl", 4)
    prompts = [{"messages": [json.loads(line)["prompt"][0]]} for line in (place / "pairs.jsonl").open()]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    adapter = (place / "reward/adapter_model.safetensors").stat().st_size
    base = sum(
        storages(load_with_head("score", ModelConfig(name=str(place / "model")), torch.float32, seed=0)).values()
    )
    buffers = 2 * 4 * 4  # rotary frequencies
    assert reward_bytes(ppo(place, "x"), torch.float32) == adapter
    assert reward_bytes(ppo(place, "x"), torch.bfloat16) == adapter
    assert reward_bytes(ppo(place, "x", rewards=[]), torch.float32) == 0
    own = adapter + base - buffers
    for changes in (
        {"adapter": {"kind": "lora", "init": "pissa"}},
        {"adapter": "full"},
        {"model": {"name": str(model_folder(place / "third"))}},
    ):
        assert reward_bytes(ppo(place, "x", **changes), torch.float32) == own
    shared, alone = (
        plan_job(ppo(place, "x", adapter={"kind": "lora", "rank": 4, "init": init}), "cpu")
        for init in ("default", "pissa")
    )
    assert alone.memory.total - shared.memory.total == base - buffers
    assert any("the reward models take" in note for note in shared.notes)
