"""Fast paths put into a model. Oracle: the same model with the library's and PEFT's own forwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tiny_models import SHAPE, random_sequences, tiny_model
from tunery.data.collate import collate
from tunery.kernels import KernelsConfig, one_word
from tunery.models.fuse import fuse
from tunery.models.load import hook_attention
from tunery.policy import CausalPolicy

REFERENCE = KernelsConfig(**one_word("reference"))
GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "granite"]
FLOAT32 = {"mixtral", "qwen2_moe"}


def lora(model: Any, **options: Any) -> Any:
    """With updates that are not zero, as they are after a step."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def outcome(model: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    policy = CausalPolicy(model, dtype=dtype)
    loss = policy.nll(collate(random_sequences()))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)]


def fused_and_not(config: Any) -> list[CausalPolicy]:
    """The same random model of a configuration of the library's, with fast paths and without."""
    import transformers

    policies = []
    for kernels in (KernelsConfig(), REFERENCE):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        assert hook_attention(model, reference=kernels.attention == "reference")
        fuse(model, kernels, torch.float32)
        policies.append(CausalPolicy(model))
    return policies


def assert_same_loss(policies: list[CausalPolicy]) -> None:
    losses = [policy.nll(collate(random_sequences())) for policy in policies]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", [*GATED, "phi3", "gpt2", "cohere", "mixtral", "qwen2_moe"])
def test_loss_and_gradients_equal_the_library(family, adapter):
    dtype = torch.float32 if family in FLOAT32 else torch.float64
    results = []
    # the library's norms are in float32, whatever the model's dtype; they have a test of their own
    for kernels in (KernelsConfig(norm="reference"), REFERENCE):
        model = tiny_model(family, dtype)
        model = lora(model) if adapter == "lora" else model
        fuse(model.train(), kernels, dtype)
        results.append(outcome(model, dtype))
    rtol, atol = (1e-3, 1e-5) if dtype == torch.float32 else (1e-9, 1e-11)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", GATED)
def test_with_norms_the_loss_is_the_library_s_to_rounding(family):
    results = []
    for kernels in (KernelsConfig(), REFERENCE):
        model = lora(tiny_model(family, torch.float32))
        fuse(model, kernels, torch.float32)
        results.append(outcome(model, torch.float32))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", GATED)
def test_the_usual_form_is_found(family):
    model = lora(tiny_model(family, torch.float32))
    fused = fuse(model, KernelsConfig(), torch.float32)
    assert fused.counts["attention"] == fused.counts["mlp"] == 2 and fused.counts["lora"] == 14
    assert fused.counts["norm"] >= 5 and not fused.refused


def test_the_first_of_two_low_rank_paths_is_the_group():
    """One call of the function for q, k and v, one for gate and up."""
    model = lora(tiny_model("llama", torch.float32))
    fuse(model, KernelsConfig(), torch.float32)
    policy = CausalPolicy(model)
    names: list[str] = []
    loss = policy.nll(collate(random_sequences()))
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        stack += [following for following, _ in node.next_functions]
    assert sum("LoraLinear" in name for name in names) == 2 * 4


def test_reference_leaves_every_module_as_it_was():
    model = lora(tiny_model("qwen2", torch.float32))
    fused = fuse(model, REFERENCE, torch.float32)
    assert not fused.counts and not any("forward" in vars(module) for module in model.modules())


def test_each_switch_switches_its_own():
    for name, kind in {"norm": "norm", "mlp": "mlp", "lora": "lora"}.items():
        model = lora(tiny_model("qwen2", torch.float32))
        counts = fuse(model, KernelsConfig(**{name: "reference"}), torch.float32).counts
        assert kind not in counts and counts["attention"] == 2


def test_a_module_that_does_something_else_is_left_alone():
    model = tiny_model("llama", torch.float32)
    layer = model.model.layers[0]
    layer.mlp.act_fn = type("SiLU", (torch.nn.Module,), {"forward": lambda self, x: torch.relu(x)})()
    fused = fuse(model, KernelsConfig(), torch.float32)
    assert "forward" not in vars(layer.mlp) and fused.counts["mlp"] == 1 and fused.refused == {"LlamaMLP"}


def test_a_switched_off_adapter_is_off():
    model = lora(tiny_model("llama"))
    ids = torch.arange(3, 20)[None]
    fuse(model, KernelsConfig(norm="reference"), torch.float64)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    torch.testing.assert_close(base, tiny_model("llama", hook=False)(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(base, trained)


def test_of_a_gated_activation_before_an_update_only_its_inputs_are_kept():
    from torch.autograd.graph import saved_tensors_hooks

    model = lora(tiny_model("llama"))
    fuse(model, KernelsConfig(), torch.float64)
    mlp = model.get_base_model().model.layers[0].mlp
    kept: dict[int, torch.Size] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.shape
        return tensor

    x = torch.randn(1, 7, SHAPE["hidden_size"], dtype=torch.float64, requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mlp(x)
    assert list(kept.values()).count(torch.Size([7, SHAPE["intermediate_size"]])) == 2  # gate and up, not the product
    out.sum().backward()
    assert x.grad is not None


def test_dropout_on_the_update_is_left_to_peft():
    """Oracle: the same seed gives the same masks as in PEFT's own forward."""
    results = []
    for kernels in (KernelsConfig(norm="reference"), REFERENCE):
        model = lora(tiny_model("llama"), lora_dropout=0.5).train()
        fuse(model, kernels, torch.float64)
        torch.manual_seed(5)
        results.append(outcome(model, torch.float64)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_generation_with_a_cache_is_the_library_s(family):
    from tunery.models.attention import library_attention

    ids = torch.arange(3, 12)[None]
    texts = []
    for kernels in (KernelsConfig(), REFERENCE):
        model = tiny_model(family, torch.float32).eval()
        fuse(model, kernels, torch.float32)
        with library_attention(model):
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


def test_a_deep_copy_is_a_model_of_its_own():
    model = tiny_model("llama", torch.float64)
    fuse(model, KernelsConfig(), torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ids = torch.arange(3, 20)[None]
    first, second = model(input_ids=ids).logits, other(input_ids=ids).logits
    assert not torch.allclose(first, second)


def test_bfloat16_is_as_near_to_float32_as_the_library():
    exact = outcome(lora(tiny_model("qwen2", torch.float32)), torch.float32)[0].item()
    errors = []
    for kernels in (KernelsConfig(), REFERENCE):
        model = lora(tiny_model("qwen2", torch.bfloat16))
        fuse(model, kernels, torch.bfloat16)
        errors.append(abs(outcome(model, torch.bfloat16)[0].item() - exact) / exact)
    assert errors[0] <= max(1.5 * errors[1], 2e-3)


def test_what_is_fused_does_not_depend_on_the_updates():
    """A run must go on as it began, when all updates were zero."""
    fresh = lora(tiny_model("qwen2"))
    for name, parameter in fresh.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.zeros_(parameter)
    trained = lora(tiny_model("qwen2"))
    assert fuse(fresh, KernelsConfig(), torch.float64) == fuse(trained, KernelsConfig(), torch.float64)


def test_a_formula_that_a_few_tokens_cannot_show_is_left_to_the_library():
    """OLMo's clipping acts on large values, StarCoder 2's dropout in training, Ministral 3's scaling far along."""
    import transformers

    cases = {
        "OlmoConfig": {"clip_qkv": 8.0},
        "Starcoder2Config": {"residual_dropout": 0.5},
        "Ministral3Config": {"head_dim": 8},
    }
    for name, options in cases.items():
        config = getattr(transformers, name)(**{**SHAPE, **options})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        assert hook_attention(model)
        assert "attention" not in fuse(model, KernelsConfig(), torch.float32).counts, name


def test_a_model_that_takes_no_packed_stream_is_asked_one_sequence_at_a_time():
    """Qwen 3.5's linear attention refuses a packed stream; oracle: the same job without fast paths."""
    from transformers import Qwen3_5TextConfig

    options = {
        **SHAPE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    policies = fused_and_not(Qwen3_5TextConfig(**options))
    assert not any(policy.packs for policy in policies)
    assert_same_loss(policies)


def test_keys_wider_than_values():
    """DeepSeek's latent attention."""
    from transformers import DeepseekV2Config

    options = {
        **SHAPE, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    assert_same_loss(fused_and_not(DeepseekV2Config(**options)))


def test_a_copy_of_attention_that_is_trained_whole_keeps_its_own_layer_s_window():
    """PEFT's modules_to_save on layers that differ. Oracle: PEFT with the library's code."""
    results = []
    for kernels in (KernelsConfig(), REFERENCE):
        model = lora(
            tiny_model("gemma3", torch.float32, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention",
            "sliding_attention"]), modules_to_save=["self_attn"],
        )  # fmt: skip
        fuse(model, kernels, torch.float32)
        results.append(outcome(model, torch.float32))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_trained_biases_beneath_an_update_are_left_to_peft():
    model = lora(tiny_model("qwen2", torch.float32), bias="lora_only")
    counts = fuse(model, KernelsConfig(), torch.float32).counts
    assert counts["lora"] == 14 - 6  # q, k and v of two layers have biases
    outcome(model, torch.float32)


def test_whoever_watches_a_projection_sees_it():
    model = lora(tiny_model("llama", torch.float32))
    fuse(model, KernelsConfig(), torch.float32)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj.base_layer", "up_proj")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    outcome(model, torch.float32)
    assert sum("q_proj" in name for name in seen) >= 2 and sum("up_proj" in name for name in seen) >= 2
