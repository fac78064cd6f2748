"""The model as an objective may see it, and the only training-time caller of its forward.

Streams go through the backbone with their boundaries; the head sees labelled rows only. Both shortcuts are checked
against the model's own forward on a few tokens before training starts, and a model for which they are not exact is
run one sequence at a time, or through its own head, and that is said."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunery.errors import ModelError
from tunery.kernels.linear_cross_entropy import CHUNK_LOGITS, linear_cross_entropy
from tunery.models.parts import Parts, cap_and_scale, take_apart, unwrap
from tunery.types import Batch

# Largest root mean square of a difference in logits, relative to their spread, that rounding may cause. Attention that
# sees its neighbour causes 0.08 and more at this length, in random tiny models as in trained ones.
PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
PROBE_LENGTH = 32


class CausalPolicy:
    """A causal language model (transformers, or PEFT around one).

    `dtype` is that of the arithmetic: where parameters are wider, the forward runs under autocast. `neftune` is the
    noise alpha of NEFTune (arXiv:2310.05914) or None. `notes` says which shortcuts the model could not take."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype = torch.float32, neftune: float | None = None):
        self.model = model
        self.causal: Any = unwrap(model)
        self.dtype = dtype
        self.neftune = neftune
        self.notes: list[str] = []
        self.device = next(model.parameters()).device
        self.parts: Parts | None = take_apart(model)
        self.packs = True
        self._probe()

    # ------------------------------------------------------------------ forwards

    def nll(self, batch: Batch) -> Tensor:
        """sum_t weights_T[t] * -log p(targets_T[t] | before): a scalar, float32 or wider."""
        rows = batch.labelled_N
        targets_N, weights_N = batch.targets_T[rows], batch.weights_T[rows]
        if self.parts is not None:
            h_NH = self._hidden(batch)[rows]
            plain = _plain_head(self.parts.head)
            if plain is not None:
                return linear_cross_entropy(
                    h_NH, plain.weight, targets_N, weights_N, plain.bias, self.parts.scale, self.parts.softcap
                )
            return -(self._logps_of(h_NH, targets_N) * weights_N).sum()
        return -(self._logps_full(batch)[rows] * weights_N).sum()

    def logps(self, batch: Batch) -> Tensor:
        """log p(targets_T[t] | before), [T]; 0 where the weight is 0. Takes any upstream gradient: each chunk of
        logits is recomputed in the backward."""
        if self.parts is None:
            return torch.where(batch.weights_T != 0, self._logps_full(batch), 0.0)
        rows = batch.labelled_N
        logps_N = self._logps_of(self._hidden(batch)[rows], batch.targets_T[rows])
        return torch.zeros(batch.n_tokens, dtype=logps_N.dtype, device=logps_N.device).index_put((rows,), logps_N)

    def _hidden(self, batch: Batch) -> Tensor:
        """The backbone's last hidden states, [T, H]."""
        assert self.parts is not None
        with self.autocast():
            out = self.parts.backbone(use_cache=False, **self._inputs(batch))
        return out.last_hidden_state[0]

    def _logps_of(self, h_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Per-row log-probabilities in chunks, [N]."""
        assert self.parts is not None
        parts = self.parts

        def chunk_logps(h: Tensor, y: Tensor) -> Tensor:
            with self.autocast():
                z = cap_and_scale(parts.head(h), parts.scale, parts.softcap)
            return z.gather(1, y[:, None])[:, 0] - z.logsumexp(-1)

        size = max(1, CHUNK_LOGITS // parts.causal.config.get_text_config().vocab_size)
        pieces = [
            checkpoint(chunk_logps, h, y, use_reentrant=False)
            for h, y in zip(h_NH.split(size), targets_N.split(size), strict=True)
        ]
        return torch.cat(pieces)  # type: ignore[arg-type]

    def _logps_full(self, batch: Batch) -> Tensor:
        """Per-token log-probabilities through the model's own head, [T]."""
        with self.autocast():
            logits = self.causal(use_cache=False, **self._inputs(batch)).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(1, batch.targets_T[:, None])[:, 0] - logits.logsumexp(-1)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"position_ids": batch.positions_T[None]}
        if self.packs:
            longest = batch.max_seqlen
            inputs |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        elif batch.n_sequences > 1:
            raise ModelError("this model takes one sequence a stream; the loader must not pack for it")
        if self.neftune is not None and self.model.training:
            inputs["inputs_embeds"] = self._noisy_embeddings(batch)
        else:
            inputs["input_ids"] = batch.ids_T[None]
        return inputs

    def _noisy_embeddings(self, batch: Batch) -> Tensor:
        """NEFTune, eq. in section 2: x + (alpha / sqrt(L d)) * Uniform(-1, 1), with L the length of each sequence."""
        assert self.neftune is not None
        with self.autocast():
            embeds = self.causal.get_input_embeddings()(batch.ids_T[None])
        lengths = batch.cu_seqlens.diff()
        lengths_T = lengths.repeat_interleave(lengths, output_size=batch.n_tokens)
        scale_T = self.neftune / (lengths_T * embeds.shape[-1]).to(embeds.dtype).sqrt()
        return embeds + torch.empty_like(embeds).uniform_(-1, 1) * scale_T[None, :, None]

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic the model trains in: parameters wider than `dtype` are cast as they are used."""
        if self.dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(self.device.type, dtype=self.dtype)
        return nullcontext()

    # ------------------------------------------------------------------ is each shortcut exact for this model?

    def _probe(self) -> None:
        """Compare a packed stream of two short sequences, and backbone and head apart, with the model's own logits."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            first, second = self._probe_sequences()
            own = [self._own_logits(ids) for ids in (first, second)]
            if all(logits.isfinite().all() for logits in own):
                self._compare(first, second, own)
            else:
                self.notes.append("the model's logits are not finite to begin with, so nothing could be compared")
        self.model.train(was_training)

    def _compare(self, first: Tensor, second: Tensor, own: list[Tensor]) -> None:
        name = type(self.causal).__name__
        if not self._packed_equals(first, second, own):
            self.packs = False
            self.notes.append(
                f"{name} does not keep packed sequences apart, so each stream holds one sequence (slower, same result)"
            )
        if self.parts is not None and not self._parts_equal(first, own[0]):
            self.parts = None
            self.notes.append(
                f"{name} does more than backbone and head, so its own forward makes all the logits (more memory, "
                "same result)"
            )

    def _probe_sequences(self) -> tuple[Tensor, Tensor]:
        vocabulary = self.causal.config.get_text_config().vocab_size
        ids = (torch.arange(2 * PROBE_LENGTH + 1, device=self.device) * 7919 + 3) % vocabulary
        return ids[:PROBE_LENGTH], ids[PROBE_LENGTH:]

    def _own_logits(self, ids: Tensor) -> Tensor:
        with self.autocast():
            return self.causal(input_ids=ids[None], use_cache=False).logits[0].double()

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
                logits = self.causal(
                    input_ids=torch.cat([first, second])[None], position_ids=positions[None], use_cache=False,
                    cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=longest, max_length_k=longest,
                ).logits[0]  # fmt: skip
        except (TypeError, ValueError, RuntimeError):
            return False
        return self._close(logits, torch.cat(own))

    def _parts_equal(self, ids: Tensor, own: Tensor) -> bool:
        assert self.parts is not None
        with self.autocast():
            hidden = self.parts.backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            logits = cap_and_scale(self.parts.head(hidden), self.parts.scale, self.parts.softcap)
        return self._close(logits, own)


def _plain_head(head: nn.Module) -> nn.Linear | None:
    """The head as a plain linear layer, or None where an adapter wraps it. PEFT's `modules_to_save` keeps the trained
    copy under the adapter's name; that one is plain again."""
    copies = getattr(head, "modules_to_save", None)
    if copies is not None and len(copies):
        head = next(iter(copies.values()))
    return head if type(head) is nn.Linear else None
