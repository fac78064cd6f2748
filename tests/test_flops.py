"""Oracles: torch's FlopCounterMode on tiny models (it counts attention as full squares, twice the causal half), and
the closed forms 6P + 6fE + 3A and 4P + 4fE + 6P_lora + 3A."""

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tunery.flops import cost_of, flops_per_token, known_peak, peak_flops

LENGTH, LABELLED = 64, 16


def llama(layers=8, **more):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            attn_implementation="eager",  # the counter knows no fused attention on a CPU
            num_attention_heads=4,
            num_key_value_heads=2,
            **more,
        )
    )


def counted(model) -> float:
    """FLOPs per token of one forward and backward, the head on labelled rows only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.randint(0, 300, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        hidden = base.base_model(ids).last_hidden_state[0, :LABELLED]
        base.get_output_embeddings()(hidden).logsumexp(-1).sum().backward()
    return counter.get_total_flops() / LENGTH


def predicted(model) -> float:
    cost = cost_of(model)
    as_squares = sum(2 * width * LENGTH * (3 if backward else 1) for width, _, backward in cost.attention)
    return flops_per_token(cost, labelled=LABELLED / LENGTH, mean_length=LENGTH) + as_squares


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=8, n_head=4, attn_implementation="eager")
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_full_agrees_with_the_flop_counter(make):
    model = make()
    assert predicted(model) == pytest.approx(counted(model), rel=0.03)


def test_lora_agrees_with_the_flop_counter():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert predicted(model) == pytest.approx(counted(model), rel=0.05)


def test_top_layers_only_agrees_with_the_flop_counter():
    model = llama()
    model.requires_grad_(False)
    model.model.layers[-2:].requires_grad_(True)
    assert predicted(model) == pytest.approx(counted(model), rel=0.05)
    assert predicted(model) < 0.55 * predicted(llama())


def test_closed_forms():
    model = llama()
    config = model.config
    width = config.num_attention_heads * config.head_dim
    per_layer = 2 * 64 * width + 2 * 64 * width // 2 + 3 * 64 * 160
    layers, head, length, share = 8 * per_layer, 300 * 64, 100.0, 0.25
    attention = 2 * length * width * 8
    full = flops_per_token(cost_of(model), labelled=share, mean_length=length)
    assert full == 6 * layers + 6 * share * head + 3 * attention
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    lora = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    expected = 4 * layers + 4 * share * head + 6 * lora + 3 * attention
    assert flops_per_token(cost_of(adapted), labelled=share, mean_length=length) == expected


def test_only_the_chosen_experts_count():
    def cost(experts):
        config = Qwen3MoeConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=experts,
            num_experts_per_tok=2,
        )
        return cost_of(Qwen3MoeForCausalLM(config)).forward - 2 * 64 * experts  # without the routers

    assert cost(4) == cost(8)


def test_a_window_limits_attention():
    near, far = (flops_per_token(cost_of(llama()), labelled=0.0, mean_length=length) for length in (100, 1000))
    assert far > near
    windowed = llama(layers=2)
    windowed.config.sliding_window, windowed.config.layer_types = 10, ["sliding_attention"] * 2
    full = llama(layers=2)
    few, many = (flops_per_token(cost_of(model), labelled=0.0, mean_length=1000) for model in (windowed, full))
    assert many - few == pytest.approx(3 * 2 * 4 * 64 * (500 - (10 - 100 / 2000)))


def attention_widths(config) -> list[int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [width for width, _, _ in cost_of(model).attention]


SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv", "xlstm"])
def test_a_recurrence_has_matrices_and_no_scores(family):
    sizes = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 8} if family == "mamba2" else {}
    config = AutoConfig.for_model(family, **SMALL, **sizes)
    assert attention_widths(config) == [0, 0, 0]
    with torch.device("meta"):
        cost = cost_of(AutoModelForCausalLM.from_config(config))
    assert cost.forward > 3 * 64 * 64 and flops_per_token(cost, labelled=1.0, mean_length=100.0) > 6 * cost.forward


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="a transformers without Gemma 4")
def test_layers_of_one_model_may_have_heads_of_other_sizes():
    """Gemma 4: 256 numbers a head through a window, 512 where there is none; the oracle is its own projections."""
    config = AutoConfig.for_model(
        "gemma4_text", **SMALL | {"num_hidden_layers": 6}, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    projections = [layer.self_attn.q_proj.out_features for layer in model.model.layers]
    assert [width for width, _, _ in cost_of(model).attention] == projections and len(set(projections)) == 2


def test_layers_without_scores_cost_no_attention():
    config = AutoConfig.for_model("lfm2", **SMALL, num_attention_heads=4, full_attn_idxs=[1])
    kinds = config.layer_types
    assert [bool(width) for width in attention_widths(config)] == [kind == "full_attention" for kind in kinds]


def test_the_table_prefers_the_special_name():
    assert known_peak("NVIDIA H200") == 989.4e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA L40S") == 362e12
    assert known_peak("NVIDIA L4") == 121e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("Some card") is None


def test_the_cpu_is_measured_once_and_quickly():
    start = time.perf_counter()
    first = peak_flops("cpu", torch.float32)
    assert time.perf_counter() - start < 1.0  # 0.1 s of measuring, and room for a busy machine
    assert 1e8 < first < 1e15
    assert peak_flops("cpu", torch.float32) == first
