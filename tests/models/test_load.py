"""Oracle: what transformers loads by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_runs import model_folder
from tunery.errors import ModelError
from tunery.models.load import ModelConfig, load_model, load_tokenizer, resolve_name


def test_names():
    assert resolve_name("builtin:tiny").endswith("tiny")
    assert resolve_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    with pytest.raises(ModelError, match=r"builtin:tinny.*builtin:tiny"):
        resolve_name("builtin:tinny")


def test_a_wrong_folder_names_the_nearest(tmp_path):
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ModelError, match=r"no such folder; did you mean .*my-model"):
        resolve_name(str(tmp_path / "my-modle"))
    with pytest.raises(ModelError, match="cannot load it"):
        load_model(ModelConfig(name=str(tmp_path / "my-model")), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_in_the_dtype_asked_for_rotary_frequencies_in_float32(tmp_path, dtype):
    folder = model_folder(tmp_path / "model")
    mine = load_model(ModelConfig(name=str(folder)), dtype)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert a.equal(b) and a.dtype == dtype, name
    assert {b.dtype for b in mine.buffers() if b.is_floating_point()} == {torch.float32}
    random = load_model(ModelConfig(name=str(folder), random_init=True), dtype)
    assert random.dtype == dtype and not random.lm_head.weight.equal(mine.lm_head.weight)
    assert {b.dtype for b in random.buffers() if b.is_floating_point()} == {torch.float32}


def test_the_tokenizer_must_be_able_to_end(tmp_path):
    folder = model_folder(tmp_path / "model")
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(ModelError, match="end-of-sequence"):
        load_tokenizer(ModelConfig(name=str(folder)))


GOOD: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 66, "num_attention_heads": 5}, r"hidden size \(66\) is not a multiple"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 and num_key_value_heads 3"),
        ({"num_attention_heads": 0}, "ZeroDivisionError|num_attention_heads is 0"),
        ({"layer_types": ["full_attention"]}, r"num_hidden_layers.* \(2\) must be equal"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "sillu"}, "can make no llama model .*KeyError: 'sillu'"),
        ({"pad_token_id": 9999}, "can make no llama model .*Padding_idx"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_is_one_clear_error(tmp_path, wrong, said):
    values = {key: value for key, value in {**GOOD, **wrong}.items() if key != "model_type" or value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=said) as error:
        load_model(ModelConfig(name=str(tmp_path), random_init=True), torch.float32, "meta")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_memory_that_runs_out_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(ModelConfig(name=str(tmp_path), random_init=True), torch.float32)
