"""Oracle: the file that transformers writes of the same model, PEFT's own merge before it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tiny_models import tiny_model
from tunery.models.weights import checkpoint_weights, ties_apart

ADAPTERS = {
    "whole": None,
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "some whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}
CASES = [
    *[("llama", name) for name in ADAPTERS],
    *[(family, "whole") for family in ("mixtral", "qwen2_moe", "gpt2", "gemma2", "bloom", "afmoe")],
    *[(family, "lora") for family in ("gpt2", "mixtral", "qwen2_moe", "phi3")],
]


def adapted(family, name, dtype=torch.float64, **changes):
    model = tiny_model(family, dtype, **changes)
    options = ADAPTERS[name]
    if options is None:
        return model
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return wrapped


def written(model, folder):
    """What is in the file that transformers writes of it."""
    model = copy.deepcopy(model)
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_what_is_saved_merged(tmp_path, family, name):
    model = adapted(family, name)
    given = list(checkpoint_weights(model))
    weights, expected = dict(given), written(model, tmp_path)
    assert len(weights) == len(given)
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-12, atol=1e-14)
        assert not weights[key].requires_grad


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_model_stays_as_it_was_to_the_bit(name):
    """In bfloat16 a merge that is taken out again would not leave it so."""
    model = adapted("llama", name, torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(ids).logits
    merged = dict(checkpoint_weights(model))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == held
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert model(ids).logits.equal(logits)
    layer = "model.layers.0.self_attn.q_proj"
    assert merged[f"{layer}.weight"].dtype == torch.float32  # rounded once, by whoever takes it
    assert not merged[f"{layer}.weight"].bfloat16().equal(before[f"base_model.model.{layer}.base_layer.weight"])


def test_tied_embeddings_that_an_adapter_takes_apart_are_noticed():
    assert ties_apart(adapted("llama", "embeddings", tie_word_embeddings=True))
    assert ties_apart(adapted("llama", "some whole", tie_word_embeddings=True))
    assert not ties_apart(adapted("llama", "lora", tie_word_embeddings=True))
    assert not ties_apart(adapted("llama", "embeddings"))
