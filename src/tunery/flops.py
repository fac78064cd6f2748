"""How many floating-point operations a token of training is worth, and how many the machine could do: the MFU.

Useful operations only: padding, recomputed activations and de-quantising do not count, so MFU falls when they grow.
A matrix of p parameters costs a token 2p in the forward, 2p for the gradient of its input where anything below it
trains, and 2p for its own gradient where it trains itself: 6P in full fine-tuning, 4P + 6P_lora with LoRA (Kaplan et
al., arXiv:2001.08361, section 2.1, and its backward twice the forward)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model's training costs, as sizes. Parameters of the layers' matrices that a token passes through (of a
    mixture of experts the chosen ones; adapters included): `forward` all of them, `backward` those that hand a
    gradient on, `trained` those that get one. `head` V*H, and whether it trains. `attention`: for each layer heads *
    head dimension, its window (None: everything before) and whether a gradient passes through."""

    forward: int
    backward: int
    trained: int
    head: int
    head_trained: bool
    attention: tuple[tuple[int, int | None, bool], ...]


def flops_per_token(cost: Cost, *, labelled: float, mean_length: float) -> float:
    """Useful FLOPs of training on one real token. `labelled`: the share of tokens that are trained on (the head
    works for those only); `mean_length`: sequence length in tokens, averaged over tokens and not over sequences
    (sum of squares over sum), because attention costs a token what stands before it."""
    layers = 2 * (cost.forward + cost.backward + cost.trained)
    head = labelled * 2 * cost.head * (2 + cost.head_trained)
    attention = 0.0
    for width, window, backward in cost.attention:
        # QK' and AV: 2 * 2 * width for each position seen; half of them on average, for causality.
        attention += 4 * width * _seen(mean_length, window) * (3 if backward else 1)
    return layers + head + attention


def frozen_share(cost: Cost, *, labelled: float, mean_length: float) -> float:
    """The share of a token's useful FLOPs in what stands below the first layer that trains: forwards alone."""
    above = replace(cost, forward=cost.backward, attention=tuple(layer for layer in cost.attention if layer[2]))
    shape = {"labelled": labelled, "mean_length": mean_length}
    return 1 - flops_per_token(above, **shape) / flops_per_token(cost, **shape)


def cost_of(model: Any) -> Cost:
    """The cost of training `model` (a transformers causal model, PEFT's wrapper or not) as it is now: what requires
    a gradient counts as trained. Works on the meta device too. The first trained layer's own input gradient, which
    need not be made, is counted, as every published MFU does."""
    first = _first_trained_layer(model)
    head_module = model.get_output_embeddings()
    inside_head = {id(module) for module in head_module.modules()} if head_module is not None else set()
    forward = backward = trained = head = 0
    head_trained = False
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or ".original_module" in name:
            continue
        for size, weight in _matrices(module, model.config.get_text_config()):
            if id(module) in inside_head:
                head += size
                head_trained |= weight.requires_grad
                continue
            forward += size
            backward += size * (_layer(name) >= first)
            trained += size * weight.requires_grad
    return Cost(forward, backward, trained, head, head_trained, _attention(model.config.get_text_config(), first))


def _matrices(module: nn.Module, config: Any) -> Iterator[tuple[int, Tensor]]:
    """(multiplications per token, weight) of a module's own matrices."""
    for weight in module._parameters.values():
        if weight is None or weight.ndim < 2:
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield int(module.in_features) * int(module.out_features), weight  # type: ignore  # 4-bit weights are packed
        elif weight.ndim == 3:  # all experts in one tensor [experts, ., .], of which a token passes through the top k
            chosen = getattr(config, "num_experts_per_tok", None) or weight.shape[0]
            yield weight.numel() // weight.shape[0] * chosen, weight
        else:
            yield weight.numel(), weight


def _layer(name: str) -> int:
    """Number of the layer that a parameter or module belongs to; those before the layers -1, those after very large."""
    match = re.search(r"\.(\d+)(\.|$)", name)
    if match:
        return int(match.group(1))
    return -1 if re.search(r"embed|wte|wpe", name) else 10**9


def _first_trained_layer(model: nn.Module) -> int:
    return min((_layer(name) for name, weight in model.named_parameters() if weight.requires_grad), default=10**9)


# Kinds of layers that make no scores of one position against another.
_WITHOUT_SCORES = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")


def _attention(config: Any, first: int) -> tuple[tuple[int, int | None, bool], ...]:
    """Of each layer. A recurrence (Mamba, RWKV, xLSTM) has no heads or no scores and a width of 0: its matrices are
    counted where they are, its state, a few percent beside them, is not."""
    layers = layer_configs(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    found = []
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        heads = 0 if kind in _WITHOUT_SCORES else getattr(layer, "num_attention_heads", 0)
        width = heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads) if heads else 0
        window = getattr(layer, "sliding_window", None) if "sliding" in kind else None
        found.append((width, window, number >= first))
    return tuple(found)


def layer_configs(config: Any) -> list[Any]:
    """The configuration of each layer, which in some families (Gemma 4) has sizes of its own."""
    return getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers


def _seen(length: float, window: int | None) -> float:
    """Positions a token of a sequence sees on average, itself included: length / 2, or less through a window."""
    if window is None or length <= window:
        return length / 2
    return window - window * window / (2 * length)


# ------------------------------------------------------------ what the machine could do

# Dense 16-bit tensor throughput in TFLOP/s with fp32 accumulation, from the makers' data sheets (figures "with
# sparsity" halved). The first name found in the device's name counts, so the special ones stand before the general.
DENSE_BF16 = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.4),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 5080", 112.6),
    ("RTX 4090", 165.2),
    ("RTX 4080", 97.5),
    ("RTX 3090", 71.0),
    ("RTX 3080 Ti", 68.2),
    ("RTX 3080", 59.5),
    ("RTX 3060 Ti", 32.4),
    ("RTX 3060", 25.5),
    ("RTX 2080 Ti", 53.8),
    ("V100", 125.0),
    ("P100", 18.7),
    ("T4", 65.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s that one device can do: the data sheet's figure for a known GPU computing in 16 bits, else the best of
    a few large matrix products, measured once (0.2 s at most on a CPU)."""
    device = torch.device(device)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return _measured(str(device), dtype)


def known_peak(name: str) -> float | None:
    """The data sheet's dense 16-bit FLOP/s of a GPU by its name, None for one that is not listed."""
    for part, tera in DENSE_BF16:
        if re.search(rf"(?<![A-Z0-9]){re.escape(part)}(?![0-9])", name):
            return tera * 1e12
    return None


@cache
def _measured(device: str, dtype: torch.dtype, budget: float = 0.1) -> float:
    size = 512 if device == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    best = 0.0
    with torch.no_grad():
        torch.mm(a, a, out=out)  # the first call also loads and chooses a kernel
        _synchronize(device)
        end = time.perf_counter() + budget
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, a, out=out)
            _synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
