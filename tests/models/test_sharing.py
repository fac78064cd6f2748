"""Prompts computed once for several answers. Oracle: every sequence whole, in float64: values, and gradients of every
parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import tiny_model
from tunery.data.collate import collate
from tunery.kernels import KernelsConfig
from tunery.models.fuse import fuse
from tunery.policy import CausalPolicy
from tunery.types import Tokens


def example(prompt: int, answers: list[int], seed: int = 0) -> list[Tokens]:
    """Sequences that begin with the same `prompt` tokens, and their answers, trained with random weights."""
    random = np.random.default_rng(seed)
    begin = random.integers(3, 131, prompt)
    return [
        Tokens(
            np.concatenate([begin, random.integers(3, 131, answer)]).astype(np.int32),
            np.concatenate([np.zeros(prompt), random.random(answer) + 0.1]).astype(np.float32),
        )
        for answer in answers
    ]


# Sequences of examples, those of one with one number: two answers, four, one, whole ones between, prompts of one token
# more than is worth sharing (and of one less), answers that go on alike, answers of one token.
EXAMPLES = [
    example(20, [7, 5]), example(3, [9], 1), example(11, [4, 1, 6, 3], 2), example(15, [6], 3), example(8, [4, 4], 4),
    example(9, [4, 4], 5), [t for t in example(30, [5], 6) for _ in range(2)],
]  # fmt: skip


def batches(examples):
    sequences = [tokens for sequences in examples for tokens in sequences]
    rows = [number for number, sequences in enumerate(examples) for _ in sequences]
    return [collate(sequences, rows, share=share) for share in (True, False)]


def logps_and_gradients(policy, batch):
    """log p of every trained token, in the order of the sequences, and the gradients of a sum with weights of both
    signs."""
    policy.model.zero_grad()
    logps_N = policy.logps(batch)[batch.labelled_N]
    (logps_N * torch.linspace(-1, 2, len(logps_N), dtype=logps_N.dtype)).sum().backward()
    return logps_N.detach(), {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def exact_policy(model):
    """In float64 throughout: the library's norms and rotary embeddings round to float32 on their way, and so does its
    softmax of capped scores, which is why it is not asked."""
    fuse(model.eval(), KernelsConfig(), torch.float64)
    return CausalPolicy(model, dtype=torch.float64, probe=False)


def assert_the_same(policy, examples, **tolerance):
    shared, whole = batches(examples)
    assert shared.n_tokens < whole.n_tokens and shared.labelled_S.equal(whole.labelled_S)
    (ours, our_grads), (theirs, their_grads) = (logps_and_gradients(policy, batch) for batch in (shared, whole))
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(policy.nll(shared), policy.nll(whole), **tolerance)


EXACT = {"rtol": 1e-8, "atol": 1e-10}
# Mistral's and Gemma's windows of 4 and 5 end within the prompts; Gemma 2 caps its scores, GPT-2 has learned positions.
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_nothing(family):
    assert_the_same(exact_policy(tiny_model(family)), EXAMPLES, **EXACT)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_with_as_many_key_heads_as_queries_and_with_one(heads):
    model = tiny_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert_the_same(exact_policy(model), EXAMPLES, **EXACT)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_see_the_same_tokens(family):
    policy = CausalPolicy(tiny_model(family, torch.float32).eval(), dtype=torch.float32)
    assert policy.shares
    assert_the_same(policy, EXAMPLES, rtol=2e-3, atol=2e-4)


def test_the_reference_hook_is_as_exact():
    from tunery.models.load import hook_attention

    model = tiny_model("mistral", hook=False)
    hook_attention(model, reference=True)
    assert_the_same(exact_policy(model), EXAMPLES, **EXACT)


@pytest.fixture(scope="module")
def windowed():
    return exact_policy(tiny_model("mistral", sliding_window=13))


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=5
    )
)
def test_any_lengths(windowed, shapes):
    examples = [example(prompt, answers, seed) for seed, (prompt, answers) in enumerate([(12, [3, 5]), *shapes])]
    assert_the_same(windowed, examples, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_families_that_can_are_found(family, dtype):
    assert CausalPolicy(tiny_model(family, dtype).eval(), dtype=dtype).shares


def test_models_that_cannot_are_found():
    """The library's own attention knows nothing of what a piece continues, Bloom's counts positions by itself, and
    noise that depends on a sequence's length is not that of its pieces."""
    assert not CausalPolicy(tiny_model("llama", hook=False).eval(), dtype=torch.float64).shares
    assert not CausalPolicy(tiny_model("bloom").eval(), dtype=torch.float64).shares
    assert not CausalPolicy(tiny_model("llama").eval(), dtype=torch.float64, neftune=5.0).shares


def test_a_model_that_looks_back_in_other_ways_is_found():
    """Each token sees the one before it in the stream, as a convolution would have it; at a sequence's position 0 it
    begins anew. Exact for packed streams, and the second answer would follow on the first."""
    model = tiny_model("llama").eval()

    def mix(_, args, kwargs):
        embeds = model.get_input_embeddings()(kwargs.pop("input_ids"))
        positions = kwargs.get("position_ids")
        positions = torch.arange(embeds.shape[1])[None] if positions is None else positions
        before = embeds.roll(1, dims=1).masked_fill((positions == 0)[..., None], 0.0)
        return args, {**kwargs, "inputs_embeds": embeds + before}

    model.model.register_forward_pre_hook(mix, with_kwargs=True)
    policy = CausalPolicy(model, dtype=torch.float64)
    assert policy.packs and not policy.shares


def test_a_model_that_does_not_pack_refuses_a_shared_batch():
    policy = CausalPolicy(tiny_model("falcon").eval(), dtype=torch.float64)
    assert not policy.packs and not policy.shares
    shared, whole = batches(EXAMPLES)
    assert policy.nll(whole).isfinite()
    with pytest.raises(ValueError, match="shares beginnings"):
        policy.nll(shared)
