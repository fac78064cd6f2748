"""What a training step keeps in memory and does, found by running it on tensors that have shapes and no numbers.

Under torch's FakeTensorMode every operation of the real code is carried out on shapes alone: the model's own forward,
the kernels, the head, autograd's backward. A Ledger beside it sees each operation, counts its arithmetic and its bytes,
and follows each tensor's memory from its making to its release. So there is no formula of what a layer saves that could
go stale, for any family of models and any kernel.

Layers that are alike are run once. The step is divided into spans (the embedding, each layer's forward, the head, each
layer's backward, what comes after), and a Profile strings the spans of one of each kind together to the whole depth."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

LOW = (torch.bfloat16, torch.float16)
# (in 16 bits, floating-point operations, bytes read and written) of one operation.
Operation = tuple[bool, int, int]
# More than any model does that takes a whole stream. One that takes a token at a time would be followed for minutes.
MOST_OPERATIONS = 50_000


@dataclass
class Span:
    """A part of a step. `start`, `peak`, `end`: bytes alive; `freed`: bytes let go in here, by the span they were made
    in; `work`: operations and how many of each; `products`: the different shapes of those in 16 bits."""

    name: Hashable
    start: int
    peak: int
    end: int = 0
    freed: Counter[Hashable] = field(default_factory=Counter)
    work: Counter[Operation] = field(default_factory=Counter)
    products: set[Hashable] = field(default_factory=set)


class TooMany(RuntimeError):
    """A Ledger has seen more than MOST_OPERATIONS."""


class Ledger(TorchDispatchMode):
    """Follows memory and work, span by span. Enter it inside a FakeTensorMode (or on real tensors). `promotes`: as a
    CPU does, which copies what an elementwise operation takes from another dtype; a GPU converts as it reads. Raises
    TooMany, for what has no end in sight."""

    def __init__(self, promotes: bool = True) -> None:
        super().__init__()
        self.promotes = promotes
        self.live = self.operations = 0
        self._made_in: dict[int, Hashable] = {}  # memory alive -> the span it was made in
        self.spans: list[Span] = [Span("before", 0, 0)]

    def enter_span(self, name: Hashable) -> None:
        self.spans[-1].end = self.live
        self.spans.append(Span(name, self.live, self.live))

    def note_work(
        self, low: bool, flops: int, moved: int, operations: int = 1, products: Iterable[Hashable] = ()
    ) -> None:
        """Arithmetic that no operation here stands for, in so many `operations`, and what tells the shapes of its
        `products` apart."""
        span = self.spans[-1]
        span.work[low, flops // operations, moved // operations] += operations
        if low:
            span.products.update(products)

    def hand_over(self, tensor: Tensor, name: Hashable) -> None:
        """Count a tensor as made in another span: the last layer's output is one, whatever the number of layers."""
        self._made_in[tensor.untyped_storage()._cdata] = name

    def own(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors made before; returns their bytes."""
        before = self.live
        for tensor in tensors:
            self._storage(tensor)
        return self.live - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise TooMany("it takes one token after the other, in more operations than can be followed")
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out = _grouped_mm(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        fresh = [self._storage(t) for t in outputs]
        if any(fresh) or func._schema.is_mutable:
            self._count(func, args, kwargs, out, outputs)
        else:  # a view, which moves nothing and takes its time
            self.spans[-1].work[False, 0, 0] += 1
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor]) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        formula = _FORMULAS.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        low = any(t.dtype in LOW for t in inputs)
        span = self.spans[-1]
        span.work[low, flops, moved] += 1
        if low and flops:
            span.products.add((func, *((t.shape, t.stride()) for t in inputs)))
        if self.promotes and torch.Tag.pointwise in func.tags:
            span.peak = max(span.peak, self.live + _promoted(inputs))

    def _storage(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is new; if so it is followed from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._made_in:
            return False
        size = storage.nbytes()
        self.live += size
        span = self.spans[-1]
        self._made_in[key] = span.name
        span.peak = max(span.peak, self.live)
        weakref.finalize(storage, self._release, key, size).atexit = False
        return True

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self.spans[-1].freed[self._made_in.pop(key)] += size


def _promoted(inputs: Sequence[Tensor]) -> int:
    """Bytes of the inputs that are not of the dtype the arithmetic is in."""
    numbers = [t for t in inputs if t.ndim and t.is_floating_point()]
    widest = max((t.element_size() for t in numbers), default=0)
    return sum(t.numel() * widest for t in numbers if t.element_size() < widest)


def _product(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """FLOPs of [..., M, K] by [..., K, N]."""
    return 2 * math.prod(a_shape) * b_shape[-1]


def _added_product(_sum_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return _product(a_shape, b_shape)


# Products that torch's own count passes over, as functions of shapes (as FlopCounterMode's custom_mapping takes them).
MORE_FLOPS = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten.baddbmm_: _added_product,
    torch.ops.aten._grouped_mm: _product,
}
_FORMULAS = flop_registry | {name: shape_wrapper(formula) for name, formula in MORE_FLOPS.items()}


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """The shape of a product of groups, for dtypes that torch has a kernel for and no shape of. Rows in groups against
    a matrix each, [M, K] by [G, K, N]; or columns in groups, [M, K] by [K, N], which gives one matrix a group."""
    if a.ndim == b.ndim == 2:
        assert offs is not None
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def in_backward(name: Hashable) -> bool:
    """Whether a span is of the backward."""
    return name == "tail" or (isinstance(name, tuple) and name[0] == "backward")


# ------------------------------------------------------------ one of each kind of layer, strung together


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the worst moment of one phase of a step."""

    phase: str
    gradients: int
    activations: int  # kept for the backward
    logits: int  # the head's own
    temporaries: int  # of the operation or layer in progress

    @property
    def dynamic(self) -> int:
        return self.gradients + self.activations + self.logits + self.temporaries


@dataclass
class Profile:
    """One micro-batch, by spans: "embed", ("forward", kind), "head", ("backward", kind), "tail". `layers`: the kind of
    each layer of the whole model, and `layer_gradients` the bytes of gradients each makes; `gradients` those of the
    whole model. `accumulates`: whether gradients were there before (a step of several micro-batches)."""

    spans: Mapping[Hashable, Span]
    layers: Sequence[int]
    layer_gradients: Sequence[int]
    gradients: int
    accumulates: bool

    def peaks(self) -> list[Peak]:
        """The worst moment of the forward, of the head and of the backward."""
        before = self.gradients if self.accumulates else 0
        live, forward = 0, 0
        for name in ("embed", *(("forward", kind) for kind in self.layers)):
            span = self.spans[name]
            forward = max(forward, live + span.peak - span.start)
            live += span.end - span.start
        kept = live
        head = self.spans["head"]
        at_once, everywhere = self._freed_of_layers(head)
        live -= everywhere  # such as autocast's copies of trained weights, which go when the forward is over
        rise = head.peak - head.start + at_once
        peaks = [Peak("forward", before, kept, 0, max(0, forward - kept))]
        peaks.append(Peak("head", before, live, max(0, rise), 0))
        live += head.end - head.start + at_once
        peaks.append(self._backward(live, before))
        return peaks

    @property
    def kept(self) -> int:
        """Bytes alive when the backward comes to the last layer, gradients of earlier micro-batches apart."""
        spans = [self.spans[name] for name in ("embed", *(("forward", kind) for kind in self.layers), "head")]
        at_once, everywhere = self._freed_of_layers(spans[-1])
        return sum(span.end - span.start for span in spans) + at_once - everywhere

    def _backward(self, live: int, made: int) -> Peak:
        """`live` bytes besides the gradients `made` so far."""
        worst = Peak("backward", made, live, 0, 0)
        steps = [(("backward", kind), grads) for kind, grads in zip(self.layers, self.layer_gradients, strict=True)]
        for name, gradients in [*reversed(steps), ("tail", 0)]:
            span = self.spans.get(name)
            if span is None:
                continue
            worst = max(worst, Peak("backward", made, live, 0, span.peak - span.start), key=lambda peak: peak.dynamic)
            change = span.end - span.start
            if not self.accumulates:
                made, change = made + gradients, change - gradients
            live += change
        return worst

    def _freed_of_layers(self, span: Span) -> tuple[int, int]:
        """Bytes made in layers' forwards and freed in a span that is not a layer's: of the layers that were run, and of
        all layers."""
        of_kind = {kind: span.freed[("forward", kind)] for kind in set(self.layers)}
        return sum(of_kind.values()), sum(of_kind[kind] for kind in self.layers)

    def products(self, part: Callable[[Hashable], bool] = lambda _: True) -> int:
        """Different shapes of products in 16 bits, in all spans or those of a `part`. Layers of one kind have the
        same."""
        return len(set().union(*(span.products for name, span in self.spans.items() if part(name))))

    def work(self, part: Callable[[Hashable], bool] = lambda _: True) -> Counter[Operation]:
        """Every operation of the micro-batch, at full depth; or those in spans whose name is of a `part`."""
        total: Counter[Operation] = Counter()
        count = Counter(self.layers)
        for name, span in self.spans.items():
            if not part(name):
                continue
            times = count[name[1]] if isinstance(name, tuple) else 1
            for operation, often in span.work.items():
                total[operation] += often * times
        return total
