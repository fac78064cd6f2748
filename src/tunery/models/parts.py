"""A causal language model taken apart: backbone, output head, and what is done to the logits after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunery.errors import ModelError


@dataclass
class Parts:
    """`causal` is the transformers model (inside a PEFT wrapper, if any); logits = cap(scale * head(backbone)).
    `scalar`: the head gives one number for a position (models/score.py), and nothing is done to it."""

    causal: Any
    backbone: nn.Module
    head: nn.Module
    scale: float
    softcap: float | None
    scalar: bool = False


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def take_apart(model: nn.Module) -> Parts | None:
    """The parts, or None where the model does not have them in the usual places. Whether they give the model's own
    logits is not believed but measured (policy.py)."""
    causal = unwrap(model)
    scores = score_head(model)
    head = causal.get_output_embeddings() if scores is None else scores
    backbone = causal.get_decoder()
    if head is None or backbone is causal or backbone is None:
        return None
    if scores is not None:
        return Parts(causal, backbone, scores, 1.0, None, scalar=True)
    config = causal.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return Parts(causal, backbone, head, scale, getattr(config, "final_logit_softcapping", None))


def score_head(model: Any) -> nn.Module | None:
    """The scalar head of a sequence classifier (or what PEFT has wrapped it in); None of a language model."""
    causal = unwrap(model)
    return getattr(causal, "score", None) if type(causal).__name__.endswith("ForSequenceClassification") else None


def cap_and_scale(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What models do to logits after the head, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def scalar(head: nn.Module, h_NH: Tensor) -> Tensor:
    """What a scalar head makes of hidden states, [N], in float32 or wider: two rewards are compared, and 16 bits would
    round their difference away."""
    with torch.autocast(h_NH.device.type, enabled=False):
        return head(h_NH.to(torch.promote_types(h_NH.dtype, torch.float32)))[:, 0]


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's stack of layers and its name, e.g. ("model.layers", ModuleList). Raises ModelError without one."""
    causal = unwrap(model)
    count = causal.config.get_text_config().num_hidden_layers
    for name, module in causal.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ModelError(f"{type(causal).__name__}: no list of {count} layers found in it")


def draws(model: nn.Module) -> bool:
    """Whether a forward in training draws at random: dropout anywhere in it, as a module or by its configuration."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    config = unwrap(model).config.get_text_config().to_dict()
    heads = ("summary", "classifier")  # of other tasks
    shares = (value for key, value in config.items() if "drop" in key and not key.startswith(heads))
    return any(isinstance(share, float) and share > 0 for share in shares)


def to_master(parameter: nn.Parameter) -> None:
    """Let a parameter train, in float32 at least: a step of 1e-5 is lost in bfloat16's 8 bits."""
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    parameter.requires_grad_(True)


def save_whole(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """A Hugging Face model folder: parameters as they are, or (changing the model) in `dtype`. Not by `model.to`, which
    would round the rotary frequencies, float32 in any model, as well."""
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)


def load_whole(model: nn.Module, folder: Path) -> None:
    """Put the weights of a model folder of the same architecture into `model`, each parameter keeping its dtype."""
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    saved = type(unwrap(model)).from_pretrained(str(folder), dtype=widest)  # its own class, custom code or not
    model.load_state_dict(saved.state_dict())
