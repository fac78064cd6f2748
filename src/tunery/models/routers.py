"""What the routers of a mixture of experts say while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from tunery.errors import ModelError


@contextmanager
def watched_routers(causal: nn.Module) -> Iterator[list[Tensor]]:
    """A list that fills with the logits [T, experts] of every router that runs meanwhile, layer by layer, with their
    gradient. Raises ModelError for a model of which transformers does not say where they are."""
    found = list(_routers(causal))
    if not found:
        raise ModelError(
            f"objective.balance_loss: {type(causal).__name__} has no routers that transformers records; set it to 0"
        )
    logits: list[Tensor] = []

    def note(index: int, output: Any) -> None:
        made = output[index] if isinstance(output, tuple) else output
        logits.append(made.reshape(-1, made.shape[-1]))

    with ExitStack() as stack:
        for module, index in found:
            handle = module.register_forward_hook(lambda _, args, output, index=index: note(index, output))
            stack.callback(handle.remove)
        yield logits


def _routers(causal: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Modules of the class that the model's code names for its `router_logits`, and which of their outputs they are."""
    recorders = (getattr(causal, "_can_record_outputs", None) or {}).get("router_logits", [])
    for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
        kind, index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
        for module in causal.modules():
            if isinstance(kind, type) and isinstance(module, kind):
                yield module, index
