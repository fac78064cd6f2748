"""Oracle: two forwards in training, which are alike where nothing is drawn at random."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny_models import tiny_model
from tunery.models.parts import draws


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("llama", {"attention_dropout": 0.3}), ("gpt2", {}), ("bloom", {}), ("qwen2_moe", {}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    ],
    ids=str,
)  # fmt: skip
def test_whether_a_forward_draws(family, changes):
    model = tiny_model(family, torch.float32, **changes).train()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        a, b = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert draws(model) == (not torch.equal(a, b))


def test_dropout_of_an_adapter_is_drawn():
    for dropout in (0.0, 0.1):
        config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout)
        assert draws(get_peft_model(tiny_model(), config)) == (dropout > 0)
