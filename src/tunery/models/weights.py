"""The model's weights as a checkpoint of it would have them, one after the other, for an engine that holds its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tunery.models.parts import unwrap


def checkpoint_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and every buffer that is saved, under the names and in the shapes of the
    family's checkpoints, as the model would be saved with its adapter merged; tied ones once. Without a gradient, and
    not a copy where nothing had to be computed.

    The base is not touched: what is merged is made beside it in float32 at least, and one layer of it exists at a time.
    Merging into the base and taking it out again would leave it rounded."""
    from transformers.core_model_loading import revert_weight_conversion

    causal = unwrap(model)
    # transformers fuses some weights on loading (experts); what a conversion needs is in one layer.
    for _, members in groupby(_plain(causal, "", set()), key=lambda item: _layer(item[0])):
        yield from revert_weight_conversion(causal, dict(members)).items()


def ties_apart(model: Any) -> bool:
    """Whether input and output embeddings are one tensor by the model's configuration, and the adapter changes one of
    them: such a model is no checkpoint of its own configuration."""
    causal = unwrap(model)
    if not getattr(causal.config.get_text_config(), "tie_word_embeddings", False):
        return False
    return any(_is_adapted(module) for module in (causal.get_input_embeddings(), causal.get_output_embeddings()))


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; of what is in no layer, the name itself."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _plain(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors below a module under the names they have without PEFT's wrappers. `seen`: tensors already given."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        with _merged(module) as base:
            yield from _plain(base, prefix, seen)
        return
    if isinstance(module, ModulesToSaveWrapper):
        yield from _plain(module.modules_to_save[module.active_adapters[0]], prefix, seen)
        return
    saved = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
    for name, tensor in [*module.named_parameters(recurse=False), *saved]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield prefix + name, tensor.detach()
    for name, child in module.named_children():
        yield from _plain(child, f"{prefix}{name}.", seen)


@contextmanager
def _merged(layer: Any) -> Iterator[nn.Module]:
    """The adapted layer's base with the adapter merged into copies of its tensors. Afterwards it has its own again; a
    detached tensor taken meanwhile stays merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrappers = [layer]  # one round the other where several tensors of a module are adapted (experts)
    while isinstance(wrappers[-1].base_layer, BaseTunerLayer):
        wrappers.append(wrappers[-1].base_layer)
    base = layer.get_base_layer()
    own = {parameter: parameter.data for parameter in base.parameters()}
    try:
        for parameter, data in own.items():
            parameter.data = data.to(torch.promote_types(data.dtype, torch.float32), copy=True)
        with torch.no_grad():  # not round the yield: whoever asks for the weights would be in it
            for wrapper in wrappers:
                wrapper.merge()
        yield base
    finally:
        for parameter, data in own.items():
            parameter.data = data.clone()
        with torch.no_grad():
            for wrapper in wrappers:  # what it computes is thrown away; that the layer knows itself unmerged is not
                wrapper.unmerge()
        for parameter, data in own.items():
            parameter.data = data
