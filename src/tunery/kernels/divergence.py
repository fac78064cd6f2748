"""Divergences of a student's next-token distribution from a teacher's, straight from hidden states.

Only labelled rows come in. They are taken in chunks and the gradient is made in the forward, as in
linear_cross_entropy.py, so that of both matrices of logits one chunk is all that is ever alive.

With s = softmax(z / tau) and t = softmax(z_teacher / tau), over the entries that both heads have (rows of padding at
the end of the larger one are left out), the generalised Jensen-Shannon divergence (Agarwal et al., arXiv:2306.13649,
eq. 1, with the ends that it names in section 3.1) and its gradient by z / tau are

    beta = 0   KL(t || s)                                           s - t
    beta = 1   KL(s || t)                                           s (d - sum s d),  d = log s - log t
    else       beta KL(t || m) + (1 - beta) KL(s || m)              s (d - sum s d),  d = (1 - beta) (log s - log m)
               m = beta t + (1 - beta) s

Of a teacher of which only the k likeliest tokens are known (`top_k_divergence`), s and t are taken over k + 1 events:
each of these tokens, and that it is none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunery.kernels.linear_cross_entropy import HeadGradients, chunk_rows

LEAST = 1e-6  # of a teacher's probability, for the tokens of which it says nothing


@dataclass(frozen=True)
class LazyLogits:
    """Logits [N, vocabulary] of N rows that are made as they are needed: cap(scale * (h W^T + b)), of `weight_VH` and
    `bias_V`; or, where that is None, `head(h)`."""

    h_NH: Tensor
    vocabulary: int
    weight_VH: Tensor | None = None
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    head: Callable[[Tensor], Tensor] | None = None

    def of(self, h: Tensor) -> Tensor:
        """Of some of the rows: products in h's dtype, the rest in float32 or wider."""
        wide = torch.promote_types(h.dtype, torch.float32)
        if self.weight_VH is None:
            assert self.head is not None
            return self.head(h).to(wide)
        with torch.autocast(h.device.type, enabled=False):
            z = (h @ self.weight_VH.to(h.dtype).T).to(wide)
        z = z if self.bias_V is None else z + self.bias_V
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class Mixture(NamedTuple):
    """What a student learns from: sum_n w_n (D_beta(teacher, student) + sft_weight * -log p(y_n)), softmaxes of the
    divergence at `temperature`, that of the target's probability p at 1."""

    beta: float
    temperature: float = 1.0
    sft_weight: float = 0.0


class Divergences(NamedTuple):
    """Scalars, float32 (or float64): `total` with a gradient; the sums of w * divergence and w * -log p without."""

    total: Tensor
    divergence: Tensor
    nll: Tensor


def divergence(
    student: LazyLogits, teacher: LazyLogits, targets_N: Tensor, weights_N: Tensor, mixture: Mixture
) -> Divergences:
    """The mixture above. Zero rows give a zero that still carries (zero) gradients. The teacher gets no gradient."""
    if student.weight_VH is None:
        return _by_autograd(student, teacher, targets_N, weights_N, mixture)
    leaves = (student.h_NH, student.weight_VH, student.bias_V)
    if not torch.is_grad_enabled():  # or the gradients would be made all the same
        leaves = tuple(None if x is None else x.detach() for x in leaves)
    return Divergences(*_Divergence.apply(*leaves, student, teacher, targets_N, weights_N, mixture))


def reference(
    student: LazyLogits, teacher: LazyLogits, targets_N: Tensor, weights_N: Tensor, mixture: Mixture
) -> Divergences:
    """The same the obvious way: all logits at once, gradients by autograd."""
    with torch.no_grad():
        z_teacher = teacher.of(teacher.h_NH)
    return _sums(student.of(student.h_NH), z_teacher, targets_N, weights_N, mixture)


def top_k_divergence(
    student: LazyLogits, ids_NK: Tensor, logps_NK: Tensor, targets_N: Tensor, weights_N: Tensor, mixture: Mixture
) -> Divergences:
    """The mixture with a teacher that gives `ids_NK` the log-probabilities `logps_NK`, at temperature 1, and the rest
    of its probability (LEAST at least) to all other tokens together. K is less than the vocabulary. Chunks of logits
    are made again in the backward."""
    assert mixture.temperature == 1.0, "of the other tokens only the sum is known, which no temperature can change"

    def chunk(h: Tensor, ids: Tensor, logps: Tensor, y: Tensor, weights: Tensor) -> Divergences:
        z = student.of(h)
        lse = z.logsumexp(-1, keepdim=True)
        others = z.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
        log_s = torch.cat([z.gather(1, ids), others], -1) - lse
        rest = (1 - logps.to(z.dtype).exp().sum(-1, keepdim=True)).clamp_min(LEAST)
        log_t = torch.cat([logps.to(z.dtype), rest.log()], -1).log_softmax(-1)
        return _weighed(_divergence(log_s, log_t, mixture.beta), z, y, weights, mixture)

    size = chunk_rows(2 * student.vocabulary, student.h_NH.device)
    parts = [x.split(size) for x in (student.h_NH, ids_NK, logps_NK, targets_N, weights_N)]
    return _added([checkpoint(chunk, *each, use_reentrant=False) for each in zip(*parts, strict=True)])


def _added(pieces: Sequence[Any]) -> Divergences:
    return Divergences(*(torch.stack(values).sum() for values in zip(*pieces, strict=True)))


def _sums(z: Tensor, z_teacher: Tensor, targets_N: Tensor, weights_N: Tensor, mixture: Mixture) -> Divergences:
    shared = min(z.shape[-1], z_teacher.shape[-1])
    log_s, log_t = ((x[:, :shared] / mixture.temperature).log_softmax(-1) for x in (z, z_teacher))
    return _weighed(_divergence(log_s, log_t, mixture.beta), z, targets_N, weights_N, mixture)


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Of each row [n], by definition."""
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _weighed(values_N: Tensor, z: Tensor, targets_N: Tensor, weights_N: Tensor, mixture: Mixture) -> Divergences:
    diverging = (values_N * weights_N).sum()
    nll = torch.nn.functional.cross_entropy(z, targets_N, reduction="none").mul(weights_N).sum()
    return Divergences(diverging + mixture.sft_weight * nll, diverging.detach(), nll.detach())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _by_autograd(
    student: LazyLogits, teacher: LazyLogits, targets_N: Tensor, weights_N: Tensor, mixture: Mixture
) -> Divergences:
    """For a head that is more than a product: chunks whose logits are made again in the backward."""

    def chunk(h: Tensor, h_teacher: Tensor, y: Tensor, weights: Tensor) -> Divergences:
        with torch.no_grad():
            z_teacher = teacher.of(h_teacher)
        return _sums(student.of(h), z_teacher, y, weights, mixture)

    size = _chunk(student, teacher)
    parts = [x.split(size) for x in (student.h_NH, teacher.h_NH, targets_N, weights_N)]
    return _added([checkpoint(chunk, *each, use_reentrant=False) for each in zip(*parts, strict=True)])


def _chunk(student: LazyLogits, teacher: LazyLogits) -> int:
    return chunk_rows(student.vocabulary + teacher.vocabulary, student.h_NH.device)


def _value_and_slope(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row [n] and its gradient by the student's z / tau [n, V]."""
    s = log_s.exp()
    if beta == 0:
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(-1), s.sub_(t)
    if beta == 1:
        difference = log_s - log_t
        values = (s * difference).sum(-1)
        return values, s.mul_(difference.sub_(values[:, None]))
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    values = beta * _kl(log_t, log_m)
    difference = (1 - beta) * (log_s - log_m)
    own = (s * difference).sum(-1)
    return values + own, s.mul_(difference.sub_(own[:, None]))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        student: LazyLogits,
        teacher: LazyLogits,
        targets_N: Tensor,
        weights_N: Tensor,
        mixture: Mixture,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(h_NH.dtype, torch.float32)
        w = weight_VH.to(h_NH.dtype)
        chunk = _chunk(student, teacher)
        shared, tau = min(student.vocabulary, teacher.vocabulary), mixture.temperature
        diverging, nll = torch.zeros(2, dtype=wide, device=h_NH.device).unbind()
        gradients = HeadGradients(ctx, h_NH, weight_VH)
        with torch.autocast(h_NH.device.type, enabled=False):
            for start in range(0, h_NH.shape[0], chunk):
                rows = slice(start, start + chunk)
                h, y, weights = h_NH[rows], targets_N[rows, None], weights_N[rows].to(wide)
                z = student.of(h)
                log_t = (teacher.of(teacher.h_NH[rows])[:, :shared].to(wide) / tau).log_softmax(-1)
                values, slope = _value_and_slope((z[:, :shared] / tau).log_softmax(-1), log_t, mixture.beta)
                lse = z.logsumexp(-1)
                diverging += (values * weights).sum()
                nll += ((lse - z.gather(1, y)[:, 0]) * weights).sum()
                if not gradients.wanted:
                    continue
                flat = 1.0 - (z / student.softcap).square() if student.softcap is not None else None
                if mixture.sft_weight:
                    dz = z.sub_(lse[:, None]).exp_()
                    dz.scatter_add_(1, y, torch.full_like(y, -1, dtype=wide))
                    dz *= mixture.sft_weight
                else:
                    dz = torch.zeros_like(z)
                dz[:, :shared] += slope.div_(tau)
                dz *= weights[:, None] * student.scale
                if flat is not None:
                    dz *= flat
                gradients.add(rows, h, w, dz)
        gradients.save(ctx)
        total = diverging + mixture.sft_weight * nll
        ctx.mark_non_differentiable(diverging, nll)
        return total, diverging, nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*HeadGradients.saved(ctx, grad_outputs[0]), None, None, None, None, None)
