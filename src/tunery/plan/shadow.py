"""A job's model as shapes alone, from its config.json: no weights are read and no memory is taken.

`Shadow` is the whole model with the adapter applied, on torch's meta device, for what can be counted; `trace` runs one
micro-batch of it, one layer of each kind, on fake tensors (see memory.py)."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunery.config import build
from tunery.job import Job, head_of
from tunery.kernels import linear_cross_entropy
from tunery.memory import Ledger, Operation, Profile
from tunery.models.fuse import fuse
from tunery.models.load import from_config, hook_attention, load_config
from tunery.models.parts import layer_list, unwrap
from tunery.models.recompute import recompute
from tunery.models.score import scorer_from_config
from tunery.models.value_head import make_value_head, needs_values
from tunery.plan.attention import standing_in
from tunery.plan.rewards import reward_bytes
from tunery.plan.teacher import in_its_place, teacher_bytes
from tunery.policy import REFERENCE, CausalPolicy
from tunery.types import Batch


@dataclass(frozen=True)
class Stream:
    """What a micro-batch is made of: the lengths of its pieces, how many of its tokens are trained on, and what each
    piece goes on from (as in Batch; empty: all are whole sequences)."""

    lengths: tuple[int, ...]
    labelled: int
    continues: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def sequences(self) -> int:
        return len(self.lengths) - len({*self.continues} - {-1})

    @property
    def apart(self) -> Stream:
        """As many tokens in as many sequences, none of which goes on from another."""
        if not self.continues:
            return self
        each, more = divmod(self.tokens, self.sequences)
        return Stream(tuple(each + (i < more) for i in range(self.sequences)), self.labelled)


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind cost the same. `first`: the number of the first of them; `gradients` in bytes."""

    first: int
    gradients: int


class Shadow:
    """The model of `job` with its adapter, on the meta device, computing in `dtype`."""

    def __init__(self, job: Job, dtype: torch.dtype):
        self.job, self.dtype = job, dtype
        self.fake = FakeTensorMode()
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = _with_adapter(job, _base(job, dtype))
        self.whole: bool = build("adapters", job.adapter).whole
        self.kinds: list[LayerKind] = []
        self.layers = self._classify()

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def weight_bytes(self) -> int:
        return _bytes(self.model.parameters()) + _bytes(self.model.buffers())

    @cached_property
    def teacher_bytes(self) -> int:
        """Of the weights of the model that a distillation learns from."""
        return teacher_bytes(self.job, self.dtype)

    @cached_property
    def reward_bytes(self) -> int:
        """Of the weights of reward models, as far as they are their own."""
        return reward_bytes(self.job, self.dtype)

    @cached_property
    def gradient_bytes(self) -> int:
        return _bytes(p for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def hidden_bytes(self) -> int:
        """Of one token between two layers."""
        base = unwrap(self.model)
        return base.config.get_text_config().hidden_size * base.dtype.itemsize

    @cached_property
    def frozen_matrices(self) -> int:
        """Parameters of the layers' matrices that do not train."""
        layers = layer_list(self.model)[1]
        return sum(p.numel() for p in layers.parameters() if p.ndim >= 2 and not p.requires_grad)

    @cached_property
    def largest_layer(self) -> int:
        """Bytes of the weights of the largest layer."""
        return max(_bytes(layer.parameters()) for layer in layer_list(self.model)[1])

    def _classify(self) -> list[int]:
        """The kind of each layer; fills `kinds`."""
        layers = layer_list(self.model)[1]
        text = unwrap(self.model).config.get_text_config()
        names = getattr(text, "layer_types", None) or [None] * len(layers)
        below = any(p.requires_grad for p in unwrap(self.model).get_input_embeddings().parameters())
        self.below = 0  # layers that have no backward: nothing trains in them or before
        seen: dict[Any, int] = {}
        kinds: list[int] = []
        before: Any = None
        # A model that works its layers' types out from their numbers is run with all of them.
        numbered = isinstance(getattr(type(text), "layer_types", None), property)
        for number, (layer, name) in enumerate(zip(layers, names, strict=True)):
            shapes = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters())
            key = (type(layer), name, shapes, below, number if numbered else None)
            key, before = (key, key == before), key  # after its like, a layer frees what that one left for it
            trained = [p for p in layer.parameters() if p.requires_grad]
            if key not in seen:
                seen[key] = len(seen)
                self.kinds.append(LayerKind(number, _bytes(trained)))
            kinds.append(seen[key])
            below = below or bool(trained)
            self.below += not below
        return kinds

    @cached_property
    def sample(self) -> nn.Module:
        """A copy of the model with one layer of each kind, on fake tensors, with the fast paths put into it."""
        model = copy.deepcopy(self.model)
        causal: Any = unwrap(model)
        name, layers = layer_list(model)
        parent, _, attribute = name.rpartition(".")
        numbers = [kind.first for kind in self.kinds]
        setattr(causal.get_submodule(parent), attribute, nn.ModuleList(layers[i] for i in numbers))
        text = causal.config.get_text_config()
        types = getattr(text, "layer_types", None)
        text.num_hidden_layers = len(numbers)
        if types and len(numbers) < len(layers):
            text.layer_types = [types[i] for i in numbers]
        with standing_in(causal, fused=False), self.fake, Ledger():
            _make_fake(model)
            fuse(model, self.job.kernels, self.dtype)
        return model.train()


def trace(
    shadow: Shadow, objective: Any, stream: Stream, rung: str = "none", *, device: str = "cpu",
    accumulates: bool = False,
) -> Profile:  # fmt: skip
    """One micro-batch's memory and work, on a `device` ("cpu" or "cuda") with activations on a `rung`. `accumulates`:
    another micro-batch of the same step came before. Raises whatever the model's code raises where it cannot run on
    shapes alone (where what it does depends on the numbers)."""
    model = shadow.sample
    recompute(model, rung)
    ledger = Ledger(promotes=device == "cpu")
    begin = 0
    with ExitStack() as stack:
        stack.enter_context(standing_in(unwrap(model), device == "cuda", ledger.note_work))
        stack.enter_context(_chunks_of(device))
        stack.enter_context(_noting(ledger, layer_list(model)[1]))
        stack.enter_context(shadow.fake)
        stack.enter_context(ledger)
        ledger.own([*model.parameters(), *model.buffers()])
        policy = CausalPolicy(
            model, dtype=shadow.dtype, probe=False, reference_head=shadow.job.kernels.head == "reference"
        )
        if needs_values(objective):
            policy.value_head = make_value_head(policy.parts, shadow.dtype, "cpu")
        policy.teacher = in_its_place(policy)
        batch = _fake_batch(stream)
        for _ in range(2 if rung == "selective" else 1):  # which learns in its first backward what it need not keep
            for parameter in _trained(model):
                parameter.grad = torch.empty_like(parameter) if accumulates else None
            begin = len(ledger.spans)
            ledger.enter_span("embed")
            try:
                loss = objective.loss(policy, batch)
            except ValueError:  # what a model says that cannot keep packed sequences apart: then it gets them alone
                policy.packs, batch = False, _fake_batch(stream.apart)
                ledger.enter_span("embed")
                loss = objective.loss(policy, batch)
            loss.sum.backward()
            del loss
            ledger.enter_span("end")
        model.zero_grad(set_to_none=True)
    spans = {span.name: span for span in ledger.spans[begin:-1]}
    gradients = [kind.gradients for kind in shadow.kinds]
    return Profile(
        spans, shadow.layers, [gradients[kind] for kind in shadow.layers], shadow.gradient_bytes, accumulates
    )


def optimizer_cost(job: Job, shadow: Shadow) -> tuple[int, int, Counter[Operation]]:
    """Bytes of the optimizer's states, bytes it needs for a moment in a step, and the work of one. Of an optimizer that
    cannot run on shapes, two moments of each trained number are assumed."""
    ledger = Ledger()
    try:
        with FakeTensorMode(), ledger:
            parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in _trained(shadow.model)]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            group = {"params": parameters, "lr": 1e-4, "weight_decay": 0.0}
            optimizer = build("optimizers", job.optimizer, [group])
            before = ledger.live
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            state = ledger.live - before
            ledger.enter_span("step")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            span = ledger.spans[-1]
            return state, span.peak - span.start, span.work
    except (RuntimeError, TypeError, NotImplementedError):
        trained = shadow.gradient_bytes
        return 2 * trained, 0, Counter({(False, 0, 10 * trained): 1})


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ------------------------------------------------------------ making it


def _base(job: Job, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(load_config(job.model))
    _plain_rotary(config.get_text_config())
    implementation = job.model.attention
    options = {} if implementation == "auto" else {"attn_implementation": implementation}
    if head_of(job) is not None:
        model = scorer_from_config(job.model, config, dtype=dtype, **options)
    else:
        model = from_config(AutoModelForCausalLM, job.model, config, dtype=dtype, **options)
    if implementation == "auto":
        hook_attention(model, reference=job.kernels.attention == "reference")
    return model


def _plain_rotary(config: Any) -> None:
    """Rotary embeddings that look at the positions to choose their frequencies cannot run on shapes; the plain ones
    have the same."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        rope["rope_type"] = "default"


def _with_adapter(job: Job, model: Any) -> Any:
    """PiSSA starts from other numbers than plain LoRA and has the same shapes."""
    config, start = job.adapter, Path(job.model.init_from) if job.model.init_from else None
    if getattr(config, "init", "default") != "default":
        config = config.model_copy(update={"init": "default"})
    if start is not None and (start / "adapter_config.json").is_file() and not build("adapters", config).whole:
        return build("adapters", config).apply(model, start)
    return build("adapters", config).apply(model)


def _make_fake(model: nn.Module) -> None:
    """Every parameter and buffer of a model on the meta device becomes a fake tensor on the CPU, tied ones one."""
    made: dict[int, tuple[Tensor, Any]] = {}  # with the old one, whose id must stay taken

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new, tensor
        return made[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


def _fake_batch(stream: Stream) -> Batch:
    tokens = stream.tokens
    whole = torch.zeros(tokens, dtype=torch.int64)
    return Batch(
        ids_T=whole, targets_T=whole, weights_T=torch.zeros(tokens), positions_T=whole,
        cu_seqlens=torch.zeros(len(stream.lengths) + 1, dtype=torch.int32), max_seqlen=max(stream.lengths),
        labelled_N=torch.zeros(stream.labelled, dtype=torch.int64),
        labelled_S=torch.zeros(stream.sequences, dtype=torch.int64),
        lengths=list(stream.lengths), continues=list(stream.continues),
        extra={REFERENCE: torch.zeros(tokens)},  # what an own forward of it costs is counted in reference.py
    )  # fmt: skip


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """The head's chunks as large as on `device`, while all tensors are on the CPU."""
    chunks = linear_cross_entropy.CHUNK_LOGITS
    before = dict(chunks)
    chunks["cpu"] = chunks[device]
    try:
        yield
    finally:
        chunks.update(before)


@contextmanager
def _noting(ledger: Ledger, layers: Any) -> Iterator[None]:
    """Let each layer say when the forward enters it, and its output's gradient when the backward does."""

    def on_gradient(tensor: Any, name: Any) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: ledger.enter_span(name))

    def enter(kind: int, args: Any, kwargs: Any) -> None:
        if kind == 0:
            on_gradient(args[0] if args else kwargs.get("hidden_states"), "tail")
        ledger.enter_span(("forward", kind))

    def leave(kind: int, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        on_gradient(output, ("backward", kind))
        if kind == len(layers) - 1:
            ledger.hand_over(output, "head")
            ledger.enter_span("head")

    with ExitStack() as stack:
        for kind, layer in enumerate(layers):
            before = layer.register_forward_pre_hook(lambda _, a, kw, kind=kind: enter(kind, a, kw), with_kwargs=True)
            after = layer.register_forward_hook(lambda _, args, output, kind=kind: leave(kind, output))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
