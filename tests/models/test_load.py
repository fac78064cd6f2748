"""Oracle: what transformers loads by itself."""

from __future__ import annotations

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
