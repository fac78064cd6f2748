"""Oracle: the same model with everything kept. What is kept is counted by torch's own profiler of allocations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tiny_models import FAMILIES, random_sequences, tiny_model
from tunery.config import build, load_kind
from tunery.data.collate import collate
from tunery.models.parts import layer_list
from tunery.models.recompute import recompute
from tunery.models.rungs import RUNGS
from tunery.policy import CausalPolicy

FLOAT32 = {"mixtral", "qwen2_moe", "afmoe"}  # the library's grouped matmul knows no float64
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "full": {},
    "freeze": {"layers": 1},
    "freeze the first": {"layers": -1},
}


def adapted(family: str, adapter: str, dtype: torch.dtype = torch.float64, options: Any = None, **shape: Any) -> Any:
    """A tiny model in training mode, LoRA's B not zero."""
    kind = adapter.split()[0]
    config = load_kind("adapters", kind).Config(**{**ADAPTERS[adapter], **(options or {})})
    torch.manual_seed(0)
    model = build("adapters", config).apply(tiny_model(family, dtype, **shape))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(policy: CausalPolicy, seed: int = 0) -> dict[str, Tensor]:
    """The loss and every gradient of a packed stream."""
    model = policy.model
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = policy.nll(collate(random_sequences()))
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys() and len(mine) > 1
    for name, value in theirs.items():
        rtol = 1e-11 if value.dtype == torch.float64 else 1e-5
        scale = float(value.abs().max())
        torch.testing.assert_close(mine[name], value, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_gives_the_same_loss_and_gradients(family, adapter):
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    model = adapted(family, adapter, dtype)
    policy = CausalPolicy(model, dtype=dtype)
    expected = gradients(policy)
    for rung in RUNGS[1:]:
        recompute(model, rung)
        for _ in range(2):  # the second time with what the first one learned
            assert_same(gradients(policy), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rung", RUNGS[1:])
def test_dropout_is_drawn_again_from_the_same_state(family, rung):
    rate: dict[str, Any] = {"attn_pdrop": 0.3, "resid_pdrop": 0.3} if family == "gpt2" else {"attention_dropout": 0.3}
    model = adapted(family, "lora", options={"dropout": 0.2}, **rate)
    policy = CausalPolicy(model, dtype=torch.float64)
    expected = gradients(policy, seed=7)
    recompute(model, rung)
    assert_same(gradients(policy, seed=7), expected)
    other = gradients(policy, seed=8)
    assert not torch.allclose(other["loss"], expected["loss"], rtol=1e-6)


def kept_bytes(model: Any, rung: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes allocated and not freed between a forward and its backward."""
    recompute(model, rung)
    policy = CausalPolicy(model, dtype=dtype)
    batch = collate(random_sequences((60, 120, 76)))
    policy.nll(batch).backward()
    model.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = policy.nll(batch)
    assert loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.events() or [])


SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "head_dim": 32}


@pytest.mark.parametrize("adapter", ["lora", "full", "freeze"])
def test_each_rung_keeps_less(adapter):
    model = adapted("llama", adapter, torch.float32, **SMALL)
    kept = {rung: kept_bytes(model, rung) for rung in RUNGS}
    assert kept["selective"] < 0.75 * kept["none"] and kept["full"] < 0.4 * kept["selective"]
    assert kept["offload"] == kept["full"]  # the host's memory is a CPU's own


def test_full_keeps_one_input_a_layer():
    models = [adapted("llama", "full", torch.float32, **{**SMALL, "num_hidden_layers": n}) for n in (2, 6)]
    few, many = (kept_bytes(model, "full") for model in models)
    inputs = 4 * 256 * SMALL["hidden_size"] * 4
    assert inputs <= many - few < 1.2 * inputs  # 4 layers more, 256 tokens, 4 bytes; and a little of the generators'


def test_a_rung_can_be_left_for_another_during_a_run():
    model = adapted("llama", "lora")
    names = list(model.state_dict())
    policy = CausalPolicy(model, dtype=torch.float64)
    expected = gradients(policy)
    layer = layer_list(model)[1][0]
    for rung in ("selective", "full", "none", "offload", "none"):
        recompute(model, rung)
        assert_same(gradients(policy), expected)
        assert list(model.state_dict()) == names
    assert "forward" not in vars(layer)
    with pytest.raises(ValueError, match="none, selective, full, offload"):
        recompute(model, "some")


def test_a_forward_replaced_by_others_comes_back():
    model = adapted("llama", "full")
    layer: Any = layer_list(model)[1][0]
    own, calls = layer.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = counted
    recompute(model, "full")
    gradients(CausalPolicy(model, dtype=torch.float64))
    assert len(calls) > 2
    recompute(model, "none")
    assert layer.forward is counted


def test_the_saved_files_are_the_same(tmp_path):
    model = adapted("llama", "full")
    model.save_pretrained(tmp_path / "none")
    recompute(model, "selective")
    model.save_pretrained(tmp_path / "selective")
    assert (tmp_path / "none" / "model.safetensors").is_file()
    for path in (tmp_path / "none").iterdir():
        assert path.read_bytes() == (tmp_path / "selective" / path.name).read_bytes()


@pytest.mark.parametrize(("adapter", "expected"), [("freeze", [1, 1, 1, 2]), ("lora", [2, 2, 2, 2])])
def test_only_layers_with_a_backward_run_twice(adapter, expected):
    model = adapted("llama", adapter, num_hidden_layers=4)
    recompute(model, "full")
    policy = CausalPolicy(model, dtype=torch.float64)
    calls = [0] * 4
    for i, layer in enumerate(layer_list(model)[1]):
        norm: Any = layer.input_layernorm
        norm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    policy.nll(collate(random_sequences())).backward()
    assert calls == expected


def test_a_cache_of_keys_and_values_grows_once():
    model = adapted("llama", "full")
    ids = torch.arange(3, 12)[None]
    expected = model(input_ids=ids, use_cache=True).logits
    recompute(model, "full")
    output = model(input_ids=ids, use_cache=True)
    output.logits.sum().backward()
    assert output.past_key_values.get_seq_length() == 9
    torch.testing.assert_close(output.logits, expected)


# ---------------------------------------------------------------- selective, on layers made for it


class Layer(nn.Module):
    """Products, and what can be done to their results in place."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.w, self.out = (nn.Parameter(torch.randn(16, 16, dtype=torch.float64) / 4) for _ in range(2))
        self.a, self.b = (nn.Parameter(torch.randn(n, 18 - n, dtype=torch.float64) / 4) for n in (16, 2))

    def forward(self, hidden: Tensor) -> Tensor:
        y = Added.apply(hidden, self.w, self.a, self.b) if self.how == "product added" else hidden @ self.w
        assert isinstance(y, Tensor)
        if self.how == "scaled":
            y.mul_(3)
        if self.how == "scaled through a view":
            y[:2].mul_(3)
        return hidden + torch.tanh(y) @ self.out


class Added(torch.autograd.Function):
    """x W + (x A) B, the second product added in place, as LoRA can be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, xa = x @ w, x @ a
        y.addmm_(xa, b)
        ctx.save_for_backward(x, xa, w, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,), (x, xa, w, a, b) = grads, ctx.saved_tensors
        return g @ w.T + g @ b.T @ a.T, x.T @ g, x.T @ (g @ b.T), xa.T @ g


class Toy(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(how) for _ in range(3))
        text = SimpleNamespace(num_hidden_layers=3)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def gradients(self) -> dict[str, Tensor]:
        self.zero_grad()
        hidden = torch.linspace(-1, 1, 80, dtype=torch.float64).reshape(5, 16)
        for layer in self.layers:
            hidden = layer(hidden)
        loss = hidden.square().sum()
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["plain", "product added", "scaled", "scaled through a view"])
def test_results_changed_in_place_are_not_taken_for_what_they_were(how):
    model = Toy(how)
    expected = model.gradients()
    recompute(model, "selective")
    for _ in range(2):
        assert_same(model.gradients(), expected)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "again"), [("plain", 0), ("product added", 0), ("scaled", 1)])
def test_kept_products_are_not_made_again(how, again):
    model = Toy(how)
    counts = []
    for rung in ("none", "selective"):
        recompute(model, rung)
        with Products() as products:
            model.gradients()
        counts.append(products.count)
    # x A, thin, is made again too where there is one
    assert counts[1] - counts[0] == 3 * again


# ---------------------------------------------------------------- offload


def test_hooks_around_a_checkpoint_see_its_input_alone():
    """What offloading rests on: inside, checkpoint has hooks of its own."""
    seen: list[Tensor] = []
    weight = torch.randn(8, 8, requires_grad=True)
    start = torch.randn(4, 8, requires_grad=True)
    hidden = start * 1

    def pack(tensor: Tensor) -> int:
        seen.append(tensor.clone())
        return len(seen) - 1

    with saved_tensors_hooks(pack, lambda number: seen[number].clone()):
        output = checkpoint(lambda x: torch.tanh(torch.tanh(x @ weight) @ weight), hidden, use_reentrant=False)
    assert len(seen) == 1 and seen[0].equal(hidden)
    output.sum().backward()
    got = start.grad
    start.grad = None
    torch.tanh(torch.tanh(start @ weight) @ weight).sum().backward()
    torch.testing.assert_close(got, start.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rung", RUNGS[1:])
def test_rungs_on_a_gpu(rung):
    """Same gradients, and offload keeps no layer's input on the device."""
    model = adapted("llama", "lora", torch.float32, **{**SMALL, "num_hidden_layers": 8}).cuda()
    policy = CausalPolicy(model, dtype=torch.float32)
    batch = collate(random_sequences((400, 600, 48))).to("cuda")

    def step() -> tuple[dict[str, Tensor], int]:
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        loss = policy.nll(batch)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept

    step()
    expected, everything = step()
    recompute(model, rung)
    step()
    got, kept = step()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    assert kept < 0.8 * everything
    if rung == "offload":
        recompute(model, "full")
        step()
        inputs = 7 * batch.n_tokens * SMALL["hidden_size"] * 4
        assert step()[1] - kept > 0.8 * inputs
