"""Oracle: the same model run from its first layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiny_models import FAMILIES, random_sequences, tiny_model
from tunery.adapters import freeze
from tunery.data.collate import collate
from tunery.models.boundary import FILE, MARK, Boundary, first_trained
from tunery.models.parts import layer_list
from tunery.models.recompute import recompute
from tunery.policy import CausalPolicy
from tunery.types import Batch

FLOAT32 = {"mixtral", "qwen2_moe", "afmoe"}  # the library's grouped matmul knows no float64
LENGTHS = (9, 17, 5, 12)
SEQUENCES = random_sequences(LENGTHS)


def depth(family: str, layers: int) -> dict[str, Any]:
    """So many layers, and no dropout."""
    if family == "gpt2":
        return {"n_layer": layers, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"n_layer" if family == "bloom" else "num_hidden_layers": layers}


def frozen(family: str = "llama", dtype: torch.dtype = torch.float64, deep: int = 3, **config: Any) -> Any:
    """A tiny model in training mode whose last layer trains, unless `config` says otherwise."""
    model = tiny_model(family, dtype, **depth(family, deep))
    return freeze.Adapter(freeze.Config(**{"layers": 1, **config})).apply(model).train()


def stream(*rows: int) -> Batch:
    return collate([SEQUENCES[row] for row in rows], rows)


def gradients(policy: CausalPolicy, *batches: Batch) -> dict[str, Tensor]:
    policy.model.zero_grad(set_to_none=True)
    loss = torch.stack([policy.nll(batch) for batch in batches]).sum()
    loss.backward()
    named = policy.model.named_parameters()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    assert mine.keys() == theirs.keys() and len(mine) > 1
    for name, value in theirs.items():
        atol = rtol * float(value.abs().max())
        torch.testing.assert_close(mine[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def count_layers(model: Any) -> list[int]:
    """How often each layer's own norm, or whatever comes first in it, has run."""
    layers = layer_list(model)[1]
    calls = [0] * len(layers)
    for i, layer in enumerate(layers):
        first = next(module for module in layer.modules() if not list(module.children()))
        first.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_with_what_was_kept(family):
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    policy = CausalPolicy(frozen(family, dtype), dtype=dtype)
    assert policy.probe_boundary().why_not is None and policy.boundary is None
    expected = gradients(policy, stream(0, 1), stream(2, 3))
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    assert_same(gradients(policy, stream(0, 1), stream(2, 3)), expected, 0)
    policy.boundary.reading = True
    calls = count_layers(policy.model)
    assert_same(gradients(policy, stream(0, 1), stream(2, 3)), expected, 0)  # the very bits
    assert calls[:2] == [0, 0] and calls[2] > 0
    assert not any("forward" in vars(layer) for layer in layer_list(policy.model)[1])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_another_packing_gives_the_same_but_for_rounding(dtype, rtol):
    policy = CausalPolicy(frozen(dtype=dtype), dtype=dtype)
    expected = gradients(policy, stream(3, 0), stream(1), stream(2))
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    for batch in (stream(0, 1), stream(2, 3)):
        policy.nll(batch)
    policy.boundary.reading = True
    assert_same(gradients(policy, stream(3, 0), stream(1), stream(2)), expected, rtol)


@pytest.mark.parametrize(("config", "below"), [({"layers": 2}, 1), ({"layers": 0, "extra": ["norm"]}, 3)])
def test_the_boundary_is_where_training_begins(config, below):
    policy = CausalPolicy(frozen(**config), dtype=torch.float64)
    assert first_trained(policy.model) == below and policy.probe_boundary().why_not is None
    expected = gradients(policy, stream(0, 1, 2, 3))
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    policy.run_frozen(stream(0, 1, 2, 3))
    policy.boundary.reading = True
    calls = count_layers(policy.model)
    assert_same(gradients(policy, stream(0, 1, 2, 3)), expected, 0)
    assert calls == [0] * below + [1] * (3 - below)


def test_rows_of_several_sequences_are_told_apart():
    """A row's sequences stand together in a stream: row 0 has two, row 1 has two."""
    policy = CausalPolicy(frozen(), dtype=torch.float64)
    one, two = collate(SEQUENCES, [0, 0, 1, 1]), collate([SEQUENCES[i] for i in (2, 3, 0, 1)], [1, 1, 0, 0])
    expected = gradients(policy, two)
    policy.boundary = Boundary(policy.model, np.array([26, 17]))
    policy.run_frozen(one)
    policy.boundary.reading = True
    assert_same(gradients(policy, two), expected, 1e-11)


def test_what_is_not_of_the_training_rows_runs_through():
    policy = CausalPolicy(frozen(), dtype=torch.float64)
    others = [collate([SEQUENCES[0]]), collate([SEQUENCES[0]], [7]), collate([SEQUENCES[0]], [1]),
              collate([SEQUENCES[0], SEQUENCES[2]], [0, 0])]  # fmt: skip
    expected = [gradients(policy, other) for other in others]
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    policy.run_frozen(stream(0, 1, 2, 3))
    policy.boundary.reading = True
    for other, gradient in zip(others, expected, strict=True):
        assert_same(gradients(policy, other), gradient, 0)


def test_evaluation_runs_through():
    """Held-out rows have the numbers of training rows."""
    policy = CausalPolicy(frozen(), dtype=torch.float64)
    policy.model.eval()
    expected = policy.nll(stream(0, 1))
    policy.model.train()
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    policy.boundary.states_TH, policy.boundary.reading = torch.full((43, 32), torch.nan), True
    policy.model.eval()
    assert policy.nll(stream(0, 1)).equal(expected)


def test_recomputed_layers_begin_with_what_was_kept():
    policy = CausalPolicy(frozen(deep=4), dtype=torch.float64)
    expected = gradients(policy, stream(0, 1))
    recompute(policy.model, "full")
    policy.boundary = Boundary(policy.model, np.array(LENGTHS))
    assert_same(gradients(policy, stream(0, 1)), expected, 0)
    policy.boundary.reading = True
    calls = count_layers(policy.model)
    assert_same(gradients(policy, stream(0, 1)), expected, 0)
    assert calls == [0, 0, 0, 2]


# ---------------------------------------------------------------- where it would not be exact


class Remembers(nn.Module):
    """An upper layer that also takes what a lower one has seen."""

    def __init__(self, layer: nn.Module, memory: list[Tensor]):
        super().__init__()
        self.layer, self.memory = layer, memory

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(hidden_states, **kwargs) + 0.1 * self.memory[-1].mean()


def test_a_model_that_needs_more_than_the_hidden_states_is_found():
    model = frozen()
    layers, memory = layer_list(model)[1], []
    layers[0].register_forward_hook(lambda _m, _i, output: memory.append(output))
    layers[2] = Remembers(layers[2], memory)
    assert "more" in str(CausalPolicy(model, dtype=torch.float64).probe_boundary().why_not)


def test_keys_shared_between_layers_are_found():
    """Gemma 3n's last layers take the keys and values of earlier ones."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma3nTextConfig"):
        pytest.skip("this transformers has no Gemma 3n")
    config = transformers.Gemma3nTextConfig(
        vocab_size=131, vocab_size_per_layer_input=131, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, laurel_rank=4, sliding_window=16, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = freeze.Adapter(freeze.Config.model_validate({"layers": 1})).apply(model)
    assert "more" in str(CausalPolicy(model, dtype=torch.float32).probe_boundary().why_not)


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({"attention_dropout": 0.2}, {}, "dropout"),
        ({}, {"layers": -1}, "the first layer trains"),
        ({}, {"extra": ["embed_tokens"]}, "before the first trained layer"),
        ({"tie_word_embeddings": True}, {"extra": ["embed_tokens"]}, "before the first trained layer"),
    ],
)
def test_what_changes_from_step_to_step_is_found(changes, config, why):
    model = tiny_model("llama", num_hidden_layers=3, **changes)
    model = freeze.Adapter(freeze.Config(**{"layers": 1, **config})).apply(model).eval()
    policy = CausalPolicy(model, dtype=torch.float64)
    state = torch.random.get_rng_state()
    assert why in str(policy.probe_boundary().why_not)
    assert policy.boundary is None and not model.training and torch.random.get_rng_state().equal(state)


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_file_holds_what_memory_holds(tmp_path, dtype):
    policy = CausalPolicy(frozen(dtype=dtype), dtype=dtype)
    inside, mapped = (Boundary(policy.model, np.array(LENGTHS)) for _ in range(2))
    mapped.open(tmp_path, 32, dtype, afresh=True)
    assert (tmp_path / FILE).stat().st_size == 43 * 32 * dtype.itemsize and mapped.steps == 0
    for boundary in (inside, mapped):
        policy.boundary = boundary
        for batch in (stream(1, 0), stream(3, 2)):
            policy.run_frozen(batch)
    assert inside.states_TH is not None and mapped.states_TH is not None
    assert inside.states_TH.equal(mapped.states_TH) and inside.states_TH.isfinite().all()
    mapped.mark(2, lambda: None)
    again = Boundary(policy.model, np.array(LENGTHS))
    again.open(tmp_path, 32, dtype, afresh=False)
    assert again.steps == 2 and again.states_TH is not None and again.states_TH.equal(inside.states_TH)
    again.close()
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_run_is_not_taken_for_ones_own(tmp_path):
    model = frozen()
    for lengths, afresh in (((9, 17), True), ((9, 18), False), ((9, 18), True)):
        (tmp_path / MARK).write_text("2")
        boundary = Boundary(model, np.array(lengths))
        boundary.open(tmp_path, 32, torch.float64, afresh=afresh)
        assert boundary.steps == 0
