"""Oracles: the names that should train, by hand; saved folders load in transformers with the same logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import tiny_model
from tunery.adapters import freeze, full
from tunery.errors import ConfigError
from tunery.setup import parameter_groups

IDS = torch.arange(9)[None]


def trained(config: freeze.Config, family: str = "llama") -> set[str]:
    model = freeze.Adapter(config).apply(tiny_model(family, torch.bfloat16, tie_word_embeddings=False))
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_last_layers_first_layers_and_names():
    last, first = trained(freeze.Config(layers=1)), trained(freeze.Config(layers=-1))
    assert last and all(n.startswith("model.layers.1.") for n in last)
    assert first and all(n.startswith("model.layers.0.") for n in first)
    assert len(trained(freeze.Config(layers=2))) == 2 * len(last)
    some = trained(freeze.Config(layers=1, modules=["mlp"], extra=["lm_head"]))
    assert some == {n for n in last if ".mlp." in n} | {"lm_head.weight"}
    assert trained(freeze.Config(layers=0, extra=["embed_tokens"])) == {"model.embed_tokens.weight"}
    gpt2 = trained(freeze.Config(layers=1), "gpt2")
    assert gpt2 and all(n.startswith("transformer.h.1.") for n in gpt2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 3}, "the model has 2 layers"),
        ({"layers": 1, "modules": ["mlq"]}, "no module named mlq"),
        ({"layers": 0}, "nothing would train"),
    ],
)
def test_wrong_choices_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        freeze.Adapter(freeze.Config(**options)).apply(tiny_model())


@pytest.mark.parametrize("kind", [full, freeze])
def test_saved_weights_load_and_come_back_bitwise(kind, tmp_path):
    adapter = kind.Adapter(kind.Config())
    model = adapter.apply(tiny_model("llama", torch.bfloat16))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-4  # less than bfloat16 can see
    before = [p.detach().clone() for p in model.parameters()]
    adapter.save(model, tmp_path / "checkpoint", "base")
    for parameter in model.parameters():
        parameter.data.zero_()
    adapter.load(model, tmp_path / "checkpoint")
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(before, model.parameters(), strict=True))
    adapter.finish(model, tmp_path / "final", "base", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "final"), dtype="auto")
    assert loaded.dtype == torch.bfloat16
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)


def test_full_trains_everything_in_float32_and_decays_matrices_only():
    adapter = full.Adapter(full.Config())
    model = adapter.apply(tiny_model("gpt2", torch.bfloat16))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    groups = parameter_groups(model, adapter, lr=1e-4, weight_decay=0.1, beside={})
    assert {(g["weight_decay"], p.ndim >= 2) for g in groups for p in g["params"]} == {(0.1, True), (0.0, False)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
