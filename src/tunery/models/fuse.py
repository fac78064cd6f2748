"""The fast paths of kernels/ put into a loaded model, module by module.

A module keeps its parameters and names; only its `forward` becomes ours, on that one instance. Which modules have the
usual form (attention with q, k, v and output projections, a gated MLP, an RMS norm) is guessed from their attributes
and then measured: the library's own forward runs once on a few tokens, and ours must give the same from the same
inputs, with the same gradients, or the module is left as it was. Low-rank updates need no guess: PEFT's layers say what
they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tunery.kernels import KernelsConfig, compiled, rotary
from tunery.kernels.backends import has_numbers
from tunery.kernels.lora import Projection, gated_lora_linear, lora_linear
from tunery.kernels.rms_norm import rms_norm
from tunery.kernels.swiglu import gated
from tunery.models.attention import HOOKS, recorded_attention
from tunery.models.parts import unwrap

# Largest root mean square of a difference, relative to the library's own, that another order of rounding may cause: of
# copies in float32 (in float64, where the norms of the library are in float32 all the same), and in 16 bits. Far from
# what rounding does (1e-6 and 0.02) and from what another formula would, so that it is not for the weights to decide:
# a resumed run must take the same paths.
EXACT = 1e-3
ROUGH = 0.15
PROBE_LENGTHS = (7, 17)
# All that the library's forward may mention in a module of the usual form. A few tokens cannot show what happens beyond
# some position (Ministral 3's scaling of queries), beyond some value (OLMo's clipping) or in training alone (a dropout
# on the output); the names in the code do.
ATTENTION_NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout",
    "attn_logit_softcapping", "config", "contiguous", "eager_attention_forward", "get_interface", "getattr",
    "head_dim", "is_sliding", "k_norm", "k_proj", "key_multiplier", "layer_idx", "o_proj", "q_norm", "q_proj",
    "reshape", "scaling", "shape", "sliding_window", "training", "transpose", "update", "use_qk_norm", "use_rope",
    "v_proj", "view", "sinks",
}  # fmt: skip
MLP_NAMES = {"act_fn", "gate_proj", "up_proj", "down_proj"}
GATES = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


@dataclass
class Fused:
    """How many modules take a fast path, by kind, and which classes were left alone because theirs gave another
    result."""

    counts: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def add(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1


def fuse(model: nn.Module, kernels: KernelsConfig, dtype: torch.dtype) -> Fused:
    """Put what `kernels` allows into `model` (transformers, or PEFT around one), which computes in `dtype`."""
    fused = Fused()
    if kernels.lora == "auto":
        for module in model.modules():
            if _plain_update(module) is not None:
                _replace(module, _lora_forward)
                fused.add("lora")
    native = next(model.parameters()).device.type == "cpu" and compiled.ready()
    candidates = {m: plan for m in unwrap(model).modules() if (plan := _plans(m, kernels, native))}
    if not candidates:
        return fused
    # Without the updates: a resumed run, whose updates are no longer zero, must decide as it did when it began.
    disabled = getattr(model, "disable_adapter", nullcontext)
    with disabled():
        calls = _library_calls(model, list(candidates), dtype)
        found = {m: _first_exact(m, candidates[m], call, dtype) for m, call in calls.items()}
    for module in candidates:
        kind, forward = found[module] if module in found else _as_its_class(module, found)
        if forward is not None:
            _replace(module, forward)
            fused.add(kind)
        elif module in calls and (kind != "attention" or calls[module].attention):
            fused.refused.add(type(module).__name__)
    return fused


def _as_its_class(module: nn.Module, found: Mapping[nn.Module, Choice]) -> Choice:
    """What became of the others of its class, for a module that was not called: an expert that no token chose. Not for
    attention, which takes constants from its call."""
    choices = [choice for other, choice in found.items() if type(other) is type(module)]
    refused = not choices or any(forward is None or kind == "attention" for kind, forward in choices)
    return ("", None) if refused else choices[0]


def _replace(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)  # a bound method, so that a deep copy of the model is one


Plan = tuple[str, Callable[["Call"], Callable[..., Any]]]
Choice = tuple[str, Callable[..., Any] | None]


def _plans(module: nn.Module, kernels: KernelsConfig, native: bool) -> list[Plan]:
    """(kind, from a recorded call to a forward) for what a module looks like; the first that is exact is taken."""
    has = lambda *names: all(isinstance(getattr(module, name, None), nn.Module) for name in names)  # noqa: E731
    if has("q_proj", "k_proj", "v_proj", "o_proj") and hasattr(module, "head_dim"):
        wanted = (kernels.lora == "auto" or kernels.rotary == "auto") and _mentions(module) <= ATTENTION_NAMES
        return [("attention", lambda call: _attention_forward(call, kernels, native))] if wanted else []
    if has("gate_proj", "up_proj", "down_proj", "act_fn"):
        gate = GATES.get(type(module.act_fn).__name__)
        if gate is None or kernels.mlp == "reference" or not _mentions(module) <= MLP_NAMES:
            return []
        return [("mlp", lambda call: _mlp_forward(gate, native, kernels.lora == "auto"))]
    if kernels.norm == "auto" and _is_rms_norm(module):
        return [
            ("norm", lambda call, o=offset, c=cast_first: _norm_forward(o, c, native))
            for offset, cast_first in ((0.0, True), (0.0, False), (1.0, False))
        ]
    return []


def _mentions(module: nn.Module) -> set[str]:
    """The globals, attributes and methods that a module's own forward names."""
    forward = inspect.unwrap(type(module).forward)
    codes = [getattr(forward, "__code__", None)]
    names: set[str] = set()
    for code in codes:
        if code is None:  # not Python: nothing can be said
            return {"?"}
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return names


# ---------------------------------------------------------------- what the library does, and whether ours is the same


@dataclass
class Call:
    """The inputs of a module when the library called it. `attention`: the constants it handed to the attention hook."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attention: dict[str, Any] = field(default_factory=dict)


def _library_calls(model: nn.Module, modules: Sequence[nn.Module], dtype: torch.dtype) -> dict[nn.Module, Call]:
    """The modules' calls while the library's code runs over two short sequences in one stream. A module that is not
    called (an expert that no token chose) has none."""
    causal: Any = unwrap(model)
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = Call(args, kwargs)

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            constants = stack.enter_context(recorded_attention(causal))
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast(device, dtype))
            _run(causal, device)
    finally:
        model.train(was_training)
    for module, handed in constants.items():
        if module in calls:
            calls[module].attention = handed
    return calls


def _run(causal: Any, device: torch.device) -> None:
    """The library's forward over a packed stream; over one sequence where its code cannot keep several apart, and none
    where it does not run at all (policy.py will say so)."""
    total = sum(PROBE_LENGTHS)
    ids = (torch.arange(total, device=device) * 7919 + 3) % causal.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(n, device=device) for n in PROBE_LENGTHS])
    bounds = torch.tensor([0, PROBE_LENGTHS[0], total], dtype=torch.int32, device=device)
    longest = max(PROBE_LENGTHS)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    for inputs in ({"position_ids": positions[None], **packed}, {}):
        with suppress(TypeError, ValueError, RuntimeError):
            causal.get_decoder()(input_ids=ids[None], use_cache=False, **inputs)
            return


def _first_exact(module: nn.Module, plans: list[Plan], call: Call, dtype: torch.dtype) -> Choice:
    """The first planned forward that gives the library's output from the library's inputs, and its gradients."""
    if plans[0][0] == "attention" and not call.attention:
        return plans[0][0], None
    for kind, make in plans:
        try:
            if _equal(module, make(call), call, dtype):
                return kind, make(call)
        except Exception:  # whatever is wrong with a fast path here, the library's own is right
            continue
    return plans[0][0], None


def _equal(module: nn.Module, forward: Callable[..., Any], call: Call, dtype: torch.dtype) -> bool:
    """In the run's own arithmetic the same dtypes and, but for rounding, numbers; and of a copy in float32 the same."""
    library = type(module).forward
    if not _same(_outcome(forward, module, call, dtype), _outcome(library, module, call, dtype), ROUGH):
        return False
    if not all(has_numbers(parameter) for parameter in module.parameters()):  # shapes and dtypes are all there is
        return True
    exact = torch.promote_types(dtype, torch.float32)
    if dtype == exact:
        return _same(_outcome(forward, module, call, exact), _outcome(library, module, call, exact), EXACT)
    copied, call = copy.deepcopy(module).to(exact), Call(*_cast((call.args, call.kwargs, call.attention), exact))
    try:
        return _same(_outcome(forward, copied, call, exact), _outcome(library, copied, call, exact), EXACT)
    finally:
        for part in copied.modules():  # holding their own bound methods, they would wait for the garbage collector
            vars(part).pop("forward", None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in a call in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(one, dtype) for one in value)
    return {name: _cast(one, dtype) for name, one in value.items()} if isinstance(value, dict) else value


def _outcome(forward: Callable[..., Any], module: nn.Module, call: Call, dtype: torch.dtype) -> list[Tensor]:
    """Output, and the gradients of the hidden states and of what trains in the module."""
    args, kwargs = list(call.args), dict(call.kwargs)
    hidden = (args[0] if args else kwargs["hidden_states"]).detach().clone().requires_grad_()
    if args:
        args[0] = hidden
    else:
        kwargs["hidden_states"] = hidden
    with torch.enable_grad(), autocast(hidden.device, dtype):
        output = forward(module, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).sin().view_as(output)
        wanted = [hidden, *(p for p in module.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(output, wanted, upstream.to(output.dtype), materialize_grads=True)
    return [output.detach(), *grads]


def _same(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> bool:
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if has_numbers(b) and not _rms(a.double() - b.double()) <= tolerance * _rms(b.double()):
            return False
    return True


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The arithmetic of a model that computes in `dtype`."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype) if low else nullcontext()


# ---------------------------------------------------------------- low-rank updates


def _plain_update(module: nn.Module) -> str | None:
    """The name of a PEFT layer's update, where it is a frozen linear layer with one plain update; None otherwise."""
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "lora_A"):
        return None
    layer: Any = module
    if layer.lora_variant or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if name not in layer.lora_A or trains or layer.lora_B[name].bias is not None:
        return None
    return name


def _projection(module: nn.Module) -> Projection | None:
    """A PEFT layer as one of a group, or None where just now it does anything but add its one plain update."""
    name = _plain_update(module)
    layer: Any = module
    if name is None or layer.disable_adapters or layer.merged:
        return None
    if layer._forward_hooks or layer.base_layer._forward_hooks:  # someone is watching each layer (guard.investigate)
        return None
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
        return None
    base = layer.base_layer
    return Projection(base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _project(x: Tensor, modules: Sequence[Any]) -> tuple[Tensor, ...]:
    """Each module's output for x; in one function where all have low-rank updates."""
    projections = [_projection(module) for module in modules]
    if any(p is None for p in projections):
        return tuple(module(x) for module in modules)
    return lora_linear(x, projections)  # type: ignore[arg-type]


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    projection = None if args or kwargs else _projection(self)
    if projection is None:
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(x, [projection])[0]


# ---------------------------------------------------------------- modules of the usual form


def _attention_forward(call: Call, kernels: KernelsConfig, native: bool) -> Callable[..., Any]:
    """Projections in groups, norms of queries and keys where the module has them, rotary embedding, our hook."""
    constants = call.attention
    grouped = kernels.lora == "auto"
    rotate = partial(rotary.rotary, compiled=native) if kernels.rotary == "auto" else _rotate_apart

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        hook = HOOKS.get(self.config._attn_implementation)
        if hook is None or past_key_values is not None or attention_mask is not None or position_embeddings is None:
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return type(self).forward(self, hidden_states, past_key_values=past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        outputs = _project(hidden_states, projections) if grouped else tuple(p(hidden_states) for p in projections)
        q, k, v = (x.view(*shape, -1, self.head_dim) for x in outputs)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotate(q, k, *position_embeddings)
        dropout = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
        out, _ = hook(self, q, k, v, None, **{**constants, **kwargs, "dropout": dropout})
        return self.o_proj(out.reshape(*shape, -1)), None

    return forward


def _rotate_apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary.reference(q, cos, sin), rotary.reference(k, cos, sin)


def _mlp_forward(activation: str, native: bool, grouped: bool) -> Callable[..., Any]:
    """down(act(gate(x)) * up(x)), gate and up as one group, and the activation as part of down where that has a
    low-rank update."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not grouped:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation, native))
        gate, up = _project(x, (self.gate_proj, self.up_proj))
        down = _projection(self.down_proj)
        if down is None:
            return self.down_proj(gated(gate, up, activation, native))
        return gated_lora_linear(gate, up, down, activation, native)

    return forward


def _is_rms_norm(module: nn.Module) -> bool:
    only_weight = [name for name, _ in module.named_parameters()] == ["weight"]
    return type(module).__name__.endswith("RMSNorm") and only_weight and _epsilon(module) is not None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _norm_forward(offset: float, cast_first: bool, native: bool) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        epsilon = _epsilon(self)
        assert epsilon is not None
        return rms_norm(hidden_states, self.weight, epsilon, offset, cast_first, native)

    return forward
