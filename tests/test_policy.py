"""Oracle: the definition of the loss through the model's own forward (tiny_models.reference_loss), float64."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_models import random_sequences, reference_loss, tiny_model
from tunery.adapters import lora
from tunery.data.collate import collate
from tunery.policy import CausalPolicy


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_packed_equals_one_by_one(family):
    policy = CausalPolicy(tiny_model(family).eval(), dtype=torch.float64)
    sequences = random_sequences()
    packed = policy.nll(collate(sequences))
    alone = torch.stack([policy.nll(collate([s])) for s in sequences]).sum()
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_logps_agree_with_nll_and_take_any_gradient(family):
    model, library = tiny_model(family), tiny_model(family, hook=False)
    model.eval(), library.eval()
    batch = collate(random_sequences())
    logps = CausalPolicy(model, dtype=torch.float64).logps(batch)
    assert logps.shape == (batch.n_tokens,) and not logps[batch.weights_T == 0].any()
    (-(logps * batch.weights_T).sum()).backward()
    expected = reference_loss(library, random_sequences())
    expected.backward()
    torch.testing.assert_close(-(logps * batch.weights_T).sum(), expected)
    for mine, theirs in zip(model.parameters(), library.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_an_adapter_on_the_head_and_a_trained_copy_of_it():
    """The chunked kernel sees plain heads only; wrapped ones take the other way to the same number."""
    sequences = random_sequences()
    for options in ({"targets": ["q_proj", "lm_head"]}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}):
        model = lora.Adapter(lora.Config(rank=2, **options)).apply(tiny_model("llama", tie_word_embeddings=False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
        policy = CausalPolicy(model.eval(), dtype=torch.float64)
        loss = policy.nll(collate(sequences))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.get_base_model().set_attn_implementation("sdpa")
        expected = reference_loss(model, sequences)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        assert any("lm_head" in name for name in grads)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad, rtol=1e-7, atol=1e-9)


def test_a_model_that_does_more_than_its_parts_goes_through_its_own_head():
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunery.models.load import hook_attention

    class Doubling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    torch.manual_seed(0)
    model = Doubling(LlamaConfig(**tiny_model().config.to_dict())).double().eval()
    hook_attention(model)
    policy = CausalPolicy(model, dtype=torch.float64)
    assert policy.parts is None and "backbone and head" in policy.notes[0]
    sequences = random_sequences()
    batch = collate(sequences)
    expected = reference_loss(model, sequences)
    torch.testing.assert_close(policy.nll(batch), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-(policy.logps(batch) * batch.weights_T).sum(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_whose_attention_sees_the_neighbour_is_caught(family, dtype):
    """The library's attention over the whole stream, deaf to the boundaries that are passed along."""
    model = tiny_model(family, dtype, hook=False)
    model.config._attn_implementation = "eager"
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "position_ids"}), with_kwargs=True
    )
    assert not CausalPolicy(model, dtype=dtype).packs
    assert CausalPolicy(tiny_model(family, dtype), dtype=dtype).packs


def test_neftune_noise_has_the_papers_size_and_stays_out_of_evaluation():
    """Uniform in +-alpha / sqrt(L d), L the length of each sequence (arXiv:2310.05914)."""
    model = tiny_model()
    policy = CausalPolicy(model, dtype=torch.float64, neftune=5.0)
    batch = collate(random_sequences((100, 4)))
    model.train()
    clean = model.get_input_embeddings()(batch.ids_T)
    noise = (policy._noisy_embeddings(batch) - clean).abs()
    for rows, length in ((slice(0, 100), 100), (slice(100, 104), 4)):
        bound = 5.0 / math.sqrt(length * 32)
        assert bound * 0.8 < noise[rows].max() <= bound
    model.eval()
    assert policy.nll(batch) == policy.nll(batch) == CausalPolicy(model, dtype=torch.float64).nll(batch)


def test_bfloat16_arithmetic_over_float32_weights_stays_near():
    model = tiny_model("llama", torch.float32)
    batch = collate(random_sequences())
    exact = float(CausalPolicy(model).nll(batch).detach())
    rough = float(CausalPolicy(model, dtype=torch.bfloat16).nll(batch).detach())
    assert abs(exact - rough) / exact < 0.02 and exact != rough
