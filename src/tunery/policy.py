"""The model as an objective may see it, and the only training-time caller of its forward.

Streams go through the backbone with their boundaries; the head sees labelled rows only. Both shortcuts are checked
against the model's own forward on a few tokens before training starts, and a model for which they are not exact is
run one sequence at a time, or through its own head, and that is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunery.errors import ModelError
from tunery.kernels import compiled, linear_cross_entropy
from tunery.kernels.divergence import LazyLogits
from tunery.kernels.linear_cross_entropy import TokenLosses, chunk_rows, token_losses
from tunery.models.attention import library_attention, set_attention
from tunery.models.boundary import Boundary, Enough, Probed, probe
from tunery.models.parts import Parts, cap_and_scale, scalar, take_apart, unwrap
from tunery.models.routers import watched_routers
from tunery.models.sharing import both_ways
from tunery.types import Batch

# Largest root mean square of a difference in logits, relative to their spread, that rounding may cause. Attention that
# sees its neighbour causes 0.08 and more at this length, in random tiny models as in trained ones.
PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
PROBE_LENGTH = 32
LOW = (torch.bfloat16, torch.float16)
# Of Batch.extra: the reference's log p of each position's target, where it is known beforehand.
REFERENCE = "reference_logps"


class CausalPolicy:
    """A causal language model, or one with a scalar head (transformers, or PEFT around one).

    `dtype` is that of the arithmetic: where parameters are wider, the forward runs under autocast. `neftune` is the
    noise alpha of NEFTune (arXiv:2310.05914) or None. `max_length`: the longest sequence that will come (None: any);
    `longest`, that or the model's context.
    `probe` off believes the shortcuts below instead of comparing, for a model that has shapes and no numbers (a plan).
    `reference_head`: the loss from all labelled logits at once. Batches of several sequences are always taken; where
    `packs` is False they are run one by one; ones that share beginnings only where `shares` is True. `notes` says
    which shortcuts the model could not take. `boundary`, once given: where training keeps the hidden states that enter
    the first trained layer. `at_start`, once given: a context in which the model has the weights that training began
    with (reference.py); `teacher`, once given: the logits of another model (teacher.py). `temperature` divides the
    logits of `logps`: that of the sampling, where what is trained on was sampled."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.float32,
        neftune: float | None = None,
        max_length: int | None = None,
        probe: bool = True,
        reference_head: bool = False,
    ):
        self.model = model
        self.causal: Any = unwrap(model)
        self.dtype = dtype
        self.neftune = neftune
        context: int | None = getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)
        self.longest = min((limit for limit in (max_length, context) if limit is not None), default=None)
        self.probes = probe
        self.notes: list[str] = []
        self.boundary: Boundary | None = None
        self.temperature = 1.0
        self.at_start: Callable[[], AbstractContextManager[None]] | None = None
        self.teacher: Callable[[Batch], LazyLogits] | None = None
        self.value_head: nn.Linear | None = None  # beside the model, once given (models/value_head.py)
        self.critic: Callable[[Batch, bool], Tensor] | None = None  # or values of another, [N] (critic.py)
        self.device = next(model.parameters()).device
        native = self.device.type == "cpu" and compiled.ready()
        fast = partial(linear_cross_entropy.linear_token_losses, compiled=native)
        self.head_losses = linear_cross_entropy.reference_token_losses if reference_head else fast
        self.parts: Parts | None = take_apart(model)
        self.packs = not _rotary_of_the_whole(self.causal.config, max_length)
        if not self.packs:
            self._alone("its rotary frequencies depend on the longest sequence of a stream")
        if probe:
            self._probe()

    @cached_property
    def shares(self) -> bool:
        """Whether a stream may have what its sequences begin with alike once (collate's `share`); tried when it is
        first asked for. Never with NEFTune, whose noise depends on the length of each whole sequence."""
        if not self.packs or self.neftune is not None:
            return False
        return not self.probes or self._shared_equals()

    # ------------------------------------------------------------------ forwards

    def nll(self, batch: Batch) -> Tensor:
        """sum_t weights_T[t] * -log p(targets_T[t] | before): a scalar, float32 or wider."""
        return self.token_losses(batch).total

    def token_losses(self, batch: Batch, dft: bool = False, z_loss: float = 0.0) -> TokenLosses:
        """The same and its relatives, as kernels/linear_cross_entropy.py has them."""
        rows = batch.labelled_N
        targets_N, weights_N = batch.targets_T[rows], batch.weights_T[rows]
        if self.parts is None:
            logps_T, lse_T = self._logps_full(batch)
            return token_losses(logps_T[rows], lse_T[rows], weights_N, dft, z_loss)
        h_NH, plain = self._hidden(batch)[rows], _plain_head(self.parts.head)
        if plain is None:
            return token_losses(*self._logps_of(h_NH, targets_N), weights_N, dft, z_loss)
        return self.head_losses(
            h_NH, plain.weight, targets_N, weights_N, plain.bias, self.parts.scale, self.parts.softcap, dft=dft,
            z_loss=z_loss,
        )  # fmt: skip

    def logps(self, batch: Batch) -> Tensor:
        """log p(targets_T[t] | before), [T]; 0 where the weight is 0. Takes any upstream gradient: each chunk of
        logits is recomputed in the backward."""
        if self.parts is None:
            return torch.where(batch.weights_T != 0, self._logps_full(batch)[0], 0.0)
        rows = batch.labelled_N
        return _spread(batch, self._logps_of(self._hidden(batch)[rows], batch.targets_T[rows])[0])

    def logps_and_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logps`, and what the value head makes of the same positions, [T] each, by one forward; or the critic, by one
        of its own."""
        if self.critic is not None:
            return self.logps(batch), _spread(batch, self.critic(batch, self.model.training))
        assert self.parts is not None and self.value_head is not None, "the objective does not say that it needs values"
        h_NH = self._hidden(batch)[batch.labelled_N]
        logps_N, _ = self._logps_of(h_NH, batch.targets_T[batch.labelled_N])
        return _spread(batch, logps_N), _spread(batch, scalar(self.value_head, h_NH))

    def routing(self) -> AbstractContextManager[list[Tensor]]:
        """Around a forward: what the routers of its experts said, [T, experts] each. Raises ModelError without any."""
        return watched_routers(self.causal)

    @property
    def experts_per_token(self) -> int:
        return self.causal.config.get_text_config().num_experts_per_tok

    def lazy_logits(self, batch: Batch) -> LazyLogits:
        """The logits of the labelled rows, not yet made; the whole matrix only of a model without a head apart."""
        rows, vocabulary = batch.labelled_N, self.causal.config.get_text_config().vocab_size
        if self.parts is None:
            return LazyLogits(self._logits_full(batch)[rows], vocabulary, head=lambda z: z)
        parts, h_NH = self.parts, self._hidden(batch)[rows]
        plain = _plain_head(parts.head)
        if plain is not None:
            return LazyLogits(h_NH, plain.weight.shape[0], plain.weight, plain.bias, parts.scale, parts.softcap)

        def head(h: Tensor) -> Tensor:
            with self.autocast():
                return cap_and_scale(parts.head(h), parts.scale, parts.softcap)

        return LazyLogits(h_NH, vocabulary, head=head)

    def reference_logps(self, batch: Batch) -> Tensor:
        """`logps` of the policy as it stood when training began, without dropout and without a gradient: those that the
        batch brings along where they were kept, else by a forward of its own."""
        kept = batch.extra.get(REFERENCE)
        if kept is not None:
            return kept
        assert self.at_start is not None, "the objective does not say that it needs a reference"
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.at_start():
                return self.logps(batch)
        finally:
            self.model.train(was_training)

    def teacher_logits(self, batch: Batch) -> LazyLogits:
        """Another model's logits of the labelled rows, not yet made, without a gradient."""
        assert self.teacher is not None, "the objective does not say that it needs a teacher"
        return self.teacher(batch)

    def values(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """What a scalar head makes of each position, [T], or of those `at` [N] alone, [N]; float32 or wider, with a
        gradient."""
        assert self.parts is not None and self.parts.scalar, "the objective does not say that it needs a scalar head"
        hidden = self._hidden(batch)
        return scalar(self.parts.head, hidden if at is None else hidden[at])

    def outcome(self, batch: Batch) -> Tensor:
        """What objectives see of the model, whatever its head: a number for each position, [T]."""
        return self.values(batch) if self.parts is not None and self.parts.scalar else self.logps(batch)

    def run_frozen(self, batch: Batch) -> None:
        """Run only the layers below the boundary, as in training, to leave their hidden states there."""
        assert self.boundary is not None
        body = self.causal if self.parts is None else self.parts.backbone
        with self.autocast(), self.boundary.around(batch, only=True):
            for inputs in self._inputs(batch):
                with suppress(Enough):
                    body(use_cache=False, **inputs)

    def probe_boundary(self) -> Probed:
        """Whether training may keep the hidden states that enter the first trained layer."""
        return probe(self, self._close)

    def _beginning(self, batch: Batch) -> AbstractContextManager[None]:
        """Around a forward: in training, where there is a boundary, it begins with the states kept there."""
        return nullcontext() if self.boundary is None or not self.model.training else self.boundary.around(batch)

    def _hidden(self, batch: Batch) -> Tensor:
        """The backbone's last hidden states, [T, H], in the arithmetic's dtype."""
        assert self.parts is not None
        backbone = self.parts.backbone
        with self.autocast(), self._beginning(batch):
            pieces = [backbone(use_cache=False, **inputs).last_hidden_state[0] for inputs in self._inputs(batch)]
        hidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return hidden.to(self.dtype) if self.dtype in LOW else hidden

    def _logps_of(self, h_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Per-row log-probabilities and logsumexp of the logits, in chunks, [N] each."""
        assert self.parts is not None
        parts = self.parts

        def chunk_logps(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with self.autocast():
                z = cap_and_scale(parts.head(h), parts.scale, parts.softcap)
                z = z if self.temperature == 1.0 else z / self.temperature
            lse = z.logsumexp(-1)
            return z.gather(1, y[:, None])[:, 0] - lse, lse

        size = chunk_rows(parts.causal.config.get_text_config().vocab_size, h_NH.device)
        pieces: list[Any] = [
            checkpoint(chunk_logps, h, y, use_reentrant=False)
            for h, y in zip(h_NH.split(size), targets_N.split(size), strict=True)
        ]
        logps, lse = zip(*pieces, strict=True)
        return torch.cat(logps), torch.cat(lse)

    def _logps_full(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of each token through the model's own head, [T] each."""
        logits = self._logits_full(batch) / self.temperature
        lse = logits.logsumexp(-1)
        return logits.gather(1, batch.targets_T[:, None])[:, 0] - lse, lse

    def _logits_full(self, batch: Batch) -> Tensor:
        """Logits through the model's own head, [T, V], float32 or wider."""
        with self.autocast(), self._beginning(batch):
            pieces = [self.causal(use_cache=False, **inputs).logits[0] for inputs in self._inputs(batch)]
        logits = torch.cat(pieces)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _inputs(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """What the model is called with: the whole stream at once, or one sequence after the other."""
        key, whole = "input_ids", batch.ids_T
        if self.neftune is not None and self.model.training:
            key, whole = "inputs_embeds", self._noisy_embeddings(batch)
        if self.packs:
            boundaries: dict[str, Any] = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
            boundaries |= {"max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
            boundaries["segment_lengths"] = batch.lengths  # for our hook: asking a device for them would wait for it
            if batch.continues:
                boundaries["segment_continues"] = batch.continues
            yield {key: whole[None], "position_ids": batch.positions_T[None], **boundaries}
            return
        if batch.continues:
            raise ValueError("the batch shares beginnings (collate's `share`), which this model cannot (policy.shares)")
        parts = zip(whole.split(batch.lengths), batch.positions_T.split(batch.lengths), strict=True)
        for piece, positions in parts:
            yield {key: piece[None], "position_ids": positions[None]}

    def _noisy_embeddings(self, batch: Batch) -> Tensor:
        """[T, H]. NEFTune, section 2: x + (alpha / sqrt(L d)) * Uniform(-1, 1), with L the length of each sequence."""
        assert self.neftune is not None
        with self.autocast():
            embeds = self.causal.get_input_embeddings()(batch.ids_T)
        lengths = batch.cu_seqlens.diff()
        lengths_T = lengths.repeat_interleave(lengths, output_size=batch.n_tokens)
        scale_T = self.neftune / (lengths_T * embeds.shape[-1]).to(embeds.dtype).sqrt()
        return embeds + torch.empty_like(embeds).uniform_(-1, 1) * scale_T[:, None]

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic the model trains in: parameters wider than `dtype` are cast as they are used."""
        if self.dtype in LOW:
            return torch.autocast(self.device.type, dtype=self.dtype)
        return nullcontext()

    # ------------------------------------------------------------------ is each shortcut exact for this model?

    def _probe(self) -> None:
        """Compare a packed stream of two short sequences, and backbone and head apart, with the model's own logits, or
        with what enters its scalar head."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            first, second = self._probe_sequences()
            own = [self._own_output(ids) for ids in (first, second)]
            if all(logits.isfinite().all() for logits in own):
                self._compare(first, second, own)
            else:
                self.notes.append("the model's logits are not finite to begin with, so nothing could be compared")
        self.model.train(was_training)

    def _compare(self, first: Tensor, second: Tensor, own: list[Tensor]) -> None:
        if self.packs and not self._packed_equals(first, second, own):
            self.packs = False
            # Whatever the reason, the library's own attention on one sequence at a time is right.
            set_attention(self.causal, "sdpa")
            self._alone("it does not keep packed sequences apart")
        if self.parts is not None and not self._parts_equal(first, own[0]):
            name = type(self.causal).__name__
            if self.parts.scalar:
                raise ModelError(f"{name} does more than backbone and linear head, so it cannot be a reward model here")
            self.parts = None
            self.notes.append(
                f"{name} does more than backbone and head, so its own forward makes all the logits (more memory, "
                "same result)"
            )

    def _alone(self, why: str) -> None:
        name = type(self.causal).__name__
        self.notes.append(f"{name} runs one sequence at a time, because {why} (slower, same result)")

    def _probe_sequences(self) -> tuple[Tensor, Tensor]:
        vocabulary = self.causal.config.get_text_config().vocab_size
        ids = (torch.arange(2 * PROBE_LENGTH + 1, device=self.device) * 7919 + 3) % vocabulary
        return ids[:PROBE_LENGTH], ids[PROBE_LENGTH:]

    def _own_output(self, ids: Tensor) -> Tensor:
        """What the library itself makes of a sequence, our attention hook left out."""
        with self.autocast(), library_attention(self.causal):
            return self._output(input_ids=ids[None]).double()

    def _output(self, **inputs: Any) -> Tensor:
        """The logits of the model's own forward, [T, V]; where it has a scalar head, of which it shows the last token's
        value alone, what enters that, [T, H]."""
        if self.parts is None or not self.parts.scalar:
            return self.causal(use_cache=False, **inputs).logits[0]
        entering: list[Tensor] = []
        hook = self.parts.head.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        try:
            self.causal(use_cache=False, **inputs)
        finally:
            hook.remove()
        return entering[0][0]

    def _close(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        error = (a.double() - b).square().mean().sqrt()
        spread = (b - b.mean(-1, keepdim=True)).square().mean().sqrt()
        return bool(error <= PROBE_TOLERANCE[self.dtype] * spread)

    def _packed_equals(self, first: Tensor, second: Tensor, own: list[Tensor]) -> bool:
        lengths = torch.tensor([0, len(first), len(first) + len(second)], dtype=torch.int32, device=self.device)
        positions = torch.cat([torch.arange(len(s), device=self.device) for s in (first, second)])
        longest = max(len(first), len(second))
        try:
            with self.autocast():
                logits = self._output(
                    input_ids=torch.cat([first, second])[None], position_ids=positions[None],
                    cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=longest, max_length_k=longest,
                )  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            return False
        return self._close(logits, torch.cat(own))

    def _shared_equals(self) -> bool:
        def ours(batch: Batch) -> Tensor:
            (inputs,) = self._inputs(batch.to(self.device))
            with self.autocast():
                return self._output(**inputs)

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self._close(
                    *both_ways(
                        lambda ids: self._own_output(ids.to(self.device)), ours,
                        self.causal.config.get_text_config().vocab_size,
                    )
                )  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            return False
        finally:
            self.model.train(was_training)

    def _parts_equal(self, ids: Tensor, own: Tensor) -> bool:
        assert self.parts is not None
        with self.autocast():
            hidden = self.parts.backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            if self.parts.scalar:
                return self._close(hidden, own)
            logits = cap_and_scale(self.parts.head(hidden), self.parts.scale, self.parts.softcap)
        return self._close(logits, own)


def _spread(batch: Batch, values_N: Tensor) -> Tensor:
    """Values of the labelled positions among zeros, [T]."""
    zeros = torch.zeros(batch.n_tokens, dtype=values_N.dtype, device=values_N.device)
    return zeros.index_put((batch.labelled_N,), values_N)


def _rotary_of_the_whole(config: Any, max_length: int | None) -> bool:
    """Dynamic and long rotary embeddings choose their frequencies by the largest position in the whole stream, so once
    a sequence is longer than the original context, its neighbours would get other ones than alone."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope") for kind in kinds):
        return False
    original = getattr(text, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return max_length is None or max_length > (original or text.max_position_embeddings)


def _plain_head(head: nn.Module) -> nn.Linear | None:
    """The head as a plain linear layer, or None where an adapter wraps it. PEFT's `modules_to_save` keeps the trained
    copy under the adapter's name; that one is plain again."""
    copies = getattr(head, "modules_to_save", None)
    if copies is not None and len(copies):
        head = next(iter(copies.values()))
    return head if type(head) is nn.Linear else None
