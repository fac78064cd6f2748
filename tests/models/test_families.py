"""Oracle: each family's own forward in the library (its own attention, one sequence at a time), loss and gradients."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FAMILIES, random_sequences, reference_loss, tiny_model
from tunery.data.collate import collate
from tunery.policy import CausalPolicy

# The library computes mixtures of experts with a grouped matmul that knows no float64.
FLOAT32 = {"mixtral", "qwen2_moe", "afmoe"}
# The library takes these families' softmax or norm in float32, whatever the model's dtype, and so rounds differently.
ROUNDS = {"gemma2", "gemma3", "bloom", "cohere"}
ALONE = {"bloom", "falcon", "doge"}  # their code takes no attention from outside, or makes a mask of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_library(family):
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    rtol, atol = (1e-3, 1e-5) if family in FLOAT32 else (1e-8, 1e-10)
    if family in ROUNDS:
        rtol, atol = 1e-5, 1e-6
    model, library = tiny_model(family, dtype), tiny_model(family, dtype, hook=False)
    model.eval(), library.eval()
    policy = CausalPolicy(model, dtype=dtype)
    sequences = random_sequences()
    loss = policy.nll(collate(sequences))
    expected = reference_loss(library, sequences)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=rtol, atol=atol)
    for (name, mine), theirs in zip(model.named_parameters(), library.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_packed_is_found_and_said(family):
    policy = CausalPolicy(tiny_model(family, torch.float32))
    assert policy.packs == (family not in ALONE)
    assert bool(policy.notes) == (family in ALONE)
    assert all("one sequence" in note for note in policy.notes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_of_the_whole_stream_forbid_packing(kind):
    """They depend on the longest sequence, once one is longer than the original context of 16."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    options = {"rope_parameters": rope, "max_position_embeddings": 64 if kind == "longrope" else 16}
    model, library = tiny_model("llama", **options), tiny_model("llama", hook=False, **options)
    model.eval(), library.eval()
    policy = CausalPolicy(model, dtype=torch.float64, max_length=60)
    assert not policy.packs and "rotary" in policy.notes[0]
    sequences = random_sequences((30, 5, 9))
    torch.testing.assert_close(policy.nll(collate(sequences)), reference_loss(library, sequences), rtol=1e-7, atol=1e-7)
    if kind == "longrope":  # a dynamic one has been stretched by the probe itself
        assert CausalPolicy(tiny_model("llama", **options), dtype=torch.float64, max_length=16).packs


def test_chunked_attention_is_left_to_the_library():
    """Llama 4 cuts attention into chunks, which the hook does not know; a short probe could not tell."""
    from tunery.models.load import hook_attention

    model = tiny_model("llama")
    model.config.attention_chunk_size = 8
    model.set_attn_implementation("sdpa")
    assert not hook_attention(model) and model.config._attn_implementation == "sdpa"
