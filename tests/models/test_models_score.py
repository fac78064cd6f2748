"""Oracles: transformers' own sequence classification, in training's packed streams and from the folders saved."""

from __future__ import annotations

import pytest
import torch

from tiny_model import byte_tokenizer, chat_template
from tiny_models import random_sequences, tiny_model, tiny_scorer
from tunery.adapters import freeze, lora
from tunery.data.collate import collate
from tunery.errors import ConfigError, ModelError
from tunery.kernels import KernelsConfig
from tunery.models.fuse import fuse
from tunery.models.load import ModelConfig, hook_attention
from tunery.models.parts import score_head
from tunery.models.score import agree_on_padding, load_with_head
from tunery.policy import CausalPolicy
from tunery.types import Message

COVERED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "bloom", "falcon", "doge"]


def own_values(model, sequences) -> torch.Tensor:
    """The library's logits of one sequence after the other."""
    model.set_attn_implementation("sdpa" if model.config.model_type != "gemma2" else "eager")
    rows = [torch.from_numpy(s.ids.astype("int64"))[None] for s in sequences]
    return torch.cat([model(input_ids=ids).logits[0] for ids in rows])


@pytest.mark.parametrize("family", COVERED)
def test_values_at_the_ends_are_the_librarys_logits(family, tmp_path):
    """From a language model's folder, value and gradient; whether or not the family takes packed streams."""
    tiny_model(family, torch.float32, hook=False).save_pretrained(tmp_path)
    model = load_with_head("score", ModelConfig(name=str(tmp_path)), torch.float32, seed=3).eval()
    hook_attention(model)
    fuse(model, KernelsConfig(), torch.float32)
    policy, sequences = CausalPolicy(model), random_sequences()
    batch = collate(sequences)
    values = policy.values(batch, batch.ends_S)
    assert values.dtype == torch.float32 and values.shape == (4,) and float(values.std()) > 1e-3
    torch.testing.assert_close(values, policy.values(batch)[batch.ends_S])
    values.square().sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    again = load_with_head("score", ModelConfig(name=str(tmp_path)), torch.float32, seed=3).eval()
    expected = own_values(again, sequences)
    expected.square().sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    for name, p in again.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(mine[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max() + 1e-3))


def test_the_last_tokens_of_sequences_that_share_their_beginning():
    sequences = random_sequences((30, 34))
    sequences[1].ids[:20] = sequences[0].ids[:20]
    for tokens in sequences:
        tokens.weights[:20], tokens.weights[20:] = 0, 1
    shared = collate(sequences, [0, 0], share=True)
    assert shared.continues and shared.ids_T[shared.ends_S].tolist() == [int(t.ids[-1]) for t in sequences]
    policy = CausalPolicy(tiny_scorer(), dtype=torch.float64)
    whole = collate(sequences)
    torch.testing.assert_close(
        policy.values(shared, shared.ends_S), policy.values(whole, whole.ends_S), rtol=1e-6, atol=1e-7
    )


def test_a_fresh_head_is_drawn_from_the_seed_and_a_trained_one_is_kept(tmp_path):
    tiny_model("llama", torch.float32, hook=False).save_pretrained(tmp_path / "base")
    base = ModelConfig(name=str(tmp_path / "base"))
    heads = [load_with_head("score", base, torch.float32, seed=seed).score.weight for seed in (1, 1, 2)]
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])
    assert 0.5 < float(heads[0].std()) / 0.02 < 1.5
    with pytest.raises(ModelError, match="has no trained head"):
        load_with_head("score", base, torch.float32)
    load_with_head("score", base, torch.float32, seed=7).save_pretrained(tmp_path / "scorer")
    again = load_with_head("score", ModelConfig(name=str(tmp_path / "scorer")), torch.float32, seed=1)
    assert again.score.weight.equal(load_with_head("score", base, torch.float32, seed=7).score.weight)
    assert (again.config.num_labels, again.config.id2label, again.config.problem_type) == (
        1,
        {0: "reward"},
        "regression",
    )


def test_the_head_is_float32_under_16_bits_and_its_values_are_not_rounded():
    model = tiny_scorer("llama", torch.bfloat16)
    model.score.float()
    batch = collate(random_sequences())
    values = CausalPolicy(model.eval(), dtype=torch.bfloat16).values(batch)
    assert values.dtype == torch.float32 and not values.equal(values.bfloat16().float())
    exact = CausalPolicy(tiny_scorer("llama", torch.float32).eval()).values(batch)
    assert float((values - exact).square().mean().sqrt() / exact.std()) < 0.05


def test_what_cannot_be_a_reward_model_is_refused(tmp_path):
    import transformers

    for family in ("granite", "llama"):
        tiny_model(family, torch.float32, hook=False).save_pretrained(tmp_path / family)
    with pytest.raises(ModelError, match="no sequence classification for granite"):
        load_with_head("score", ModelConfig(name=str(tmp_path / "granite")), torch.float32, seed=0)
    tiny_scorer("llama", torch.float32, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="classifies into 3 labels"):
        load_with_head("score", ModelConfig(name=str(tmp_path / "three")), torch.float32, seed=0)
    bert = transformers.BertConfig(
        vocab_size=131, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="not a backbone with a linear head"):
        load_with_head("score", ModelConfig(name=str(tmp_path / "bert")), torch.float32, seed=0)


@pytest.mark.parametrize("padding", ["<pad>", "</s>", "\n", None])
def test_transformers_finds_the_same_last_token_in_padded_batches(padding):
    """Whatever the tokenizer pads with: also with the very token that ends the sequences, or with none."""
    tokenizer, template, model = byte_tokenizer(), chat_template(), tiny_scorer(vocab_size=264).eval()
    if padding is not None and len(padding) == 1:
        padding = tokenizer.convert_ids_to_tokens(tokenizer(padding)["input_ids"])[0]  # which ends sequences here
    tokenizer.pad_token = padding
    talks = [[Message("user", "One?"), Message("assistant", text)] for text in ("Yes.", "No, I do not think so.")]
    ids = [template.encode(talk)[0].ids.tolist() for talk in talks]
    agree_on_padding(model, tokenizer, template)
    assert model.config.pad_token_id == tokenizer.pad_token_id not in (None, ids[0][-1])
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    model.set_attn_implementation("sdpa")
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in ids])
    torch.testing.assert_close(model(**padded).logits, alone)
    batch = collate([template.encode(talk)[0] for talk in talks])
    hook_attention(model)
    torch.testing.assert_close(
        CausalPolicy(model, dtype=torch.float64).values(batch, batch.ends_S), alone[:, 0], rtol=1e-6, atol=1e-7
    )


def test_the_head_trains_in_float32_in_every_adapter():
    wrapped = lora.Adapter(lora.Config(rank=2)).apply(tiny_scorer(dtype=torch.bfloat16))
    head = {n: p for n, p in wrapped.named_parameters() if p.requires_grad and "score" in n}
    assert len(head) == 1 and all(p.dtype == torch.float32 for p in head.values())
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "score" not in n and "lora_" not in n)
    frozen = freeze.Adapter(freeze.Config(layers=1)).apply(tiny_scorer(dtype=torch.bfloat16))
    assert score_head(frozen).weight.requires_grad and score_head(frozen).weight.dtype == torch.float32
    assert lora.Adapter(lora.Config(rank=2)).apply(tiny_model()).peft_config["default"].task_type == "CAUSAL_LM"
    with pytest.raises(ConfigError):
        lora.Adapter(lora.Config(rank=2, modules_to_save=["lm_head"])).apply(tiny_scorer())
