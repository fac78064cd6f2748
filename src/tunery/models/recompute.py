"""Activations made again in the backward instead of kept (Chen et al., arXiv:1604.06174), in rungs.

| rung | kept of each layer between forward and backward |
| --- | --- |
| none | everything the backward asks for |
| selective | its input, and the outputs of matmuls and attention; norms, activations and rotary are made again |
| full | its input |
| offload | its input, in the host's pinned memory |

Less memory and more time from rung to rung, and on every one the same losses and gradients: whatever is random is drawn
again from the same state. Layers that nothing trained comes before have no backward and keep nothing on any rung."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tunery.models.parts import layer_list
from tunery.models.rungs import RUNGS

# A product is made again where its inner dimension is less than this share of its width: as LoRA's B, it costs little
# arithmetic for the bytes it fills. No family's own projections are that far from square.
THIN = 1 / 8


def recompute(model: nn.Module, rung: str) -> None:
    """Put a causal language model (transformers, or PEFT around one) on a rung; it may be on another already, and in
    the middle of a run. Each layer's `forward` is replaced on the instance, so parameters, their names and what is
    saved stay as they are. On a CPU, whose memory is the host's, offload is full. Raises ValueError for an unknown
    rung, ModelError where the model has no list of layers."""
    if rung not in RUNGS:
        raise ValueError(f"rung {rung!r}: expected one of {', '.join(RUNGS)}")
    host = _Host()
    for layer in layer_list(model)[1]:
        if isinstance(layer.forward, _Recomputed):
            layer.forward.leave(layer)
        if rung != "none":
            layer.forward = _Recomputed(layer, rung, host)


class _Recomputed:
    """A layer's `forward`, keeping what its rung keeps."""

    def __init__(self, layer: nn.Module, rung: str, host: _Host):
        self.forward: Callable[..., Any] = layer.forward
        self.was_replaced = "forward" in vars(layer)
        self.rung, self.host = rung, host
        self.trains = any(parameter.requires_grad for parameter in layer.parameters())
        self.unused = 0  # operations at the layer's end whose outputs its backward did not ask for

    def leave(self, layer: nn.Module) -> None:
        """Give the layer its own forward back."""
        if self.was_replaced:
            layer.forward = self.forward
        else:
            del layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, run = _apart(self.forward, args, kwargs)
        if hidden is None or not torch.is_grad_enabled() or not (self.trains or hidden.requires_grad):
            return self.forward(*args, **kwargs)
        around = self.host.hooks() if self.rung == "offload" and hidden.is_cuda else nullcontext()
        with around:
            if self.rung != "selective":
                return checkpoint(run, hidden, use_reentrant=False)
            return checkpoint(run, hidden, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        entries: list[_Entry] = []
        return _Keeping(self, entries), _Reusing(self, entries)


def _apart(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, Any]:
    """The hidden states, and the rest of the call as a function of them: checkpoint may move what it is given, and the
    rest (positions, rotary tables) is the same for all layers. None where there is nothing to do twice: a cache of keys
    and values would grow by it."""
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        return None, None
    if args and isinstance(args[0], Tensor):
        return args[0], partial(_call, forward, args[1:], kwargs)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs.get("hidden_states"), partial(_call_named, forward, rest)


def _call(forward: Callable[..., Any], rest: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Any:
    return forward(hidden, *rest, **kwargs)


def _call_named(forward: Callable[..., Any], rest: dict[str, Any], hidden: Tensor) -> Any:
    return forward(hidden_states=hidden, **rest)


# ---------------------------------------------------------------- selective: what is worth keeping


class _Entry:
    """What an operation gave in the forward; None where it is made again."""

    __slots__ = ("output",)

    def __init__(self, output: Any):
        self.output = output


class _Keeping(TorchDispatchMode):
    """The forward: keep the outputs of expensive operations, in order. An output that is changed in place afterwards is
    not kept, unless by a product added to it: what is kept then is the sum, and both are passed over the next time."""

    supports_higher_order_operators = True

    def __init__(self, layer: _Recomputed, entries: list[_Entry]):
        super().__init__()
        self.layer, self.entries = layer, entries
        self.by_storage: dict[int, _Entry] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if _adds_product(func):
            self.entries.append(self.by_storage.get(_storage(args[0])) or _Entry(None))
        elif _is_expensive(func, args, kwargs):
            entry = _Entry(_each(torch.Tensor.detach, output))
            self.entries.append(entry)
            _each(lambda tensor: self.by_storage.setdefault(_storage(tensor), entry), output)
        else:
            for position, name in _written(func):
                target = args[position] if position < len(args) else kwargs.get(name)
                if isinstance(target, Tensor) and _storage(target) in self.by_storage:
                    self.by_storage.pop(_storage(target)).output = None
        return output

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for entry in self.entries[max(0, len(self.entries) - self.layer.unused) :]:
            entry.output = None
        self.by_storage.clear()


class _Reusing(TorchDispatchMode):
    """The forward again, in the backward, with what was kept. It is left as soon as the backward has all it asks for,
    so whatever comes after that need not be kept the next time."""

    supports_higher_order_operators = True

    def __init__(self, layer: _Recomputed, entries: list[_Entry]):
        super().__init__()
        self.layer, self.entries, self.reached = layer, entries, 0

    def __enter__(self) -> Any:
        self.reached = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        adds = _adds_product(func)
        if not adds and not _is_expensive(func, args, kwargs):
            return func(*args, **kwargs)
        entry = self.entries[self.reached]
        self.reached += 1
        if entry.output is None:
            return func(*args, **kwargs)
        return args[0] if adds else _each(torch.Tensor.detach, entry.output)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.layer.unused = len(self.entries) - self.reached


_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_mm"}


@cache
def _name(func: Any) -> str:
    """An operation's own name; none where it is a program (torch's higher-order operators)."""
    return func._schema.name.partition("::")[2] if hasattr(func, "_schema") else ""


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that an operation changes."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments if _name(func) else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _adds_product(func: Any) -> bool:
    return _name(func) in ("addmm_", "baddbmm_")


def _is_expensive(func: Any, args: Any, kwargs: Any) -> bool:
    """A product that is not thin, or attention. A function of the operation and the shapes it gets alone, so that both
    forwards say the same. Attention with dropout is made again: leaving it out would shift what is drawn after it."""
    name = _name(func)
    if name in _PRODUCTS:
        if _written(func):
            return False
        left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        return left.shape[-1] >= THIN * right.shape[-1]
    return ("attention" in name or "attn" in name) and not _dropout(func, args, kwargs)


def _dropout(func: Any, args: Any, kwargs: Any) -> float:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            return args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value or 0.0)
    return 0.0


def _each(function: Callable[[Tensor], Any], output: Any) -> Any:
    """`function` of each tensor of an operation's output, which is one or several."""
    if isinstance(output, tuple | list):
        return tuple(function(value) if isinstance(value, Tensor) else value for value in output)
    return function(output)


def _storage(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's, of tensors without numbers as well."""
    return tensor.untyped_storage()._cdata


# ---------------------------------------------------------------- offload: where the inputs wait


class _Parked:
    """One layer's input on the host. `ahead`: its copy on the device, where that was started before it was needed."""

    def __init__(self, host: Tensor, device: torch.device, before: _Parked | None):
        self.host, self.device = host, device
        self.before = weakref.ref(before) if before is not None else lambda: None
        self.ahead: Tensor | None = None


class _Host:
    """Copies to and from pinned memory on a stream of their own, beside the arithmetic. When a layer's input is asked
    for, that of the layer before it, the next to be, is fetched as well."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.last: Any = lambda: None

    def hooks(self) -> saved_tensors_hooks:
        """Around `checkpoint`, whose input is all that is saved under them: inside it has hooks of its own."""
        return saved_tensors_hooks(self._park, self._fetch)

    def _park(self, tensor: Tensor) -> _Parked:
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        parked = _Parked(
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), tensor.device, before=self.last()
        )
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            parked.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        self.last = weakref.ref(parked)
        return parked

    def _fetch(self, parked: _Parked) -> Tensor:
        self._start(parked)
        before = parked.before()
        tensor, parked.ahead = parked.ahead, None
        assert tensor is not None
        current = torch.cuda.current_stream(parked.device)
        current.wait_stream(self.stream)
        tensor.record_stream(current)
        if before is not None:
            self._start(before)
        return tensor

    def _start(self, parked: _Parked) -> None:
        if parked.ahead is None:
            with torch.cuda.stream(self.stream):
                parked.ahead = parked.host.to(parked.device, non_blocking=True)
