"""Cross-entropy straight from hidden states, without ever holding the whole matrix of logits.

Only labelled rows come in; they are taken in chunks, and because pretraining and SFT know every token's weight
beforehand, the gradient is made in the forward: z = h W^T, then in place dz = w (softmax(z) - onehot(y)),
dh = dz W, and dW += dz^T h only if the head trains. The logits of one chunk are all that is ever alive (the idea of
Apple's Cut Cross-Entropy, arXiv:2411.09009, and Liger Kernel, arXiv:2410.10989).

Two relatives differ in dz alone. DFT (Wu et al., arXiv:2508.05629, eq. 9) weighs each token by its own probability, of
which no gradient is taken: w softmax(z)[y] in the place of w. The z-loss (PaLM, Chowdhery et al., arXiv:2204.02311,
section 5) adds c w lse(z)^2, and so 2 c w lse(z) softmax(z) to dz."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunery.kernels.backends import runs_compiled

# Logits alive at a time: 16 MB in float32 on a CPU, about its cache; 256 MB on a GPU, which wants large products.
# Never those of fewer than FEWEST_ROWS, though: each chunk reads the whole weight, and where the vocabulary is large
# that takes longer than the arithmetic of a few rows.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}
FEWEST_ROWS = 128


class TokenLosses(NamedTuple):
    """Scalars, float32 (or float64): `total` with a gradient; `nll`, the plain sum of w * -log p, and `squares`, of
    w * logsumexp(logits)^2, without."""

    total: Tensor
    nll: Tensor
    squares: Tensor


def linear_cross_entropy(*head: Any, **options: Any) -> Tensor:
    """sum_n weights[n] * -log p[targets[n]] alone, of what `linear_token_losses` takes."""
    return linear_token_losses(*head, **options).total


def linear_token_losses(
    h_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    compiled: bool = False,
    dft: bool = False,
    z_loss: float = 0.0,
) -> TokenLosses:
    """total = sum_n weights[n] * -log softmax(cap(scale * (h[n] W^T + b)))[targets[n]], a float32 (or float64) scalar;
    with `dft` and `z_loss` (c) as above.

    cap(z) = softcap * tanh(z / softcap) when given (Gemma 2, arXiv:2408.00118, section 2). Matmuls run in h's dtype,
    the softmax in float32 or wider. Zero rows give a zero that still carries (zero) gradients. `compiled` asks for
    compiled.py's softmax on a CPU (in bfloat16 and float32; without a bias, a cap, `dft` or `z_loss`)."""
    if not torch.is_grad_enabled():  # or the gradients would be made all the same
        h_NH, weight_VH = h_NH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    compiled = compiled and bias_V is None and softcap is None and not dft and not z_loss
    return TokenLosses(
        *_LinearCrossEntropy.apply(h_NH, weight_VH, bias_V, targets_N, weights_N, scale, softcap, compiled, dft, z_loss)
    )


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits may be alive at a time."""
    return max(FEWEST_ROWS, CHUNK_LOGITS["cpu" if device.type == "cpu" else "cuda"] // vocabulary)


def reference(*head: Any, **options: Any) -> Tensor:
    return reference_token_losses(*head, **options).total


def reference_token_losses(
    h_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dft: bool = False,
    z_loss: float = 0.0,
) -> TokenLosses:
    """The same numbers the obvious way, for tests: all logits at once, gradients by autograd."""
    logits_NV = torch.nn.functional.linear(h_NH, weight_VH.to(h_NH.dtype), bias_V)
    logits_NV = logits_NV.to(torch.promote_types(h_NH.dtype, torch.float32)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    nll_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return token_losses(-nll_N, logits_NV.logsumexp(-1), weights_N, dft, z_loss)


def token_losses(logps_N: Tensor, lse_N: Tensor, weights_N: Tensor, dft: bool, z_loss: float) -> TokenLosses:
    """By definition, from the targets' log-probabilities and the logarithms of the softmax's sums."""
    nll_N, squares_N = -logps_N * weights_N, lse_N.square() * weights_N
    total = (nll_N * logps_N.detach().exp()).sum() if dft else nll_N.sum()
    if z_loss:
        total = total + z_loss * squares_N.sum()
    return TokenLosses(total, nll_N.detach().sum(), squares_N.detach().sum())


class HeadGradients:
    """Gradients by a head's hidden states [N, H], weight [V, H] and bias [V] - a function's first three inputs - made
    in its forward, a chunk of rows at a time; those that are not asked for are left out. Sums over rows are in float32
    or wider."""

    def __init__(self, ctx: Any, h_NH: Tensor, weight_VH: Tensor):
        train_h, train_w, train_b = ctx.needs_input_grad[:3]
        self.wanted: bool = train_h or train_w or train_b
        wide = torch.promote_types(h_NH.dtype, torch.float32)
        of_weight = torch.promote_types(weight_VH.dtype, torch.float32)
        self.dtype = weight_VH.dtype
        self.dh_NH = torch.empty_like(h_NH) if train_h else None
        self.dw_VH = torch.zeros_like(weight_VH, dtype=of_weight) if train_w else None
        self.db_V = torch.zeros(weight_VH.shape[0], dtype=wide, device=h_NH.device) if train_b else None

    def add(self, rows: slice, h: Tensor, w_VH: Tensor, dz: Tensor) -> None:
        """What follows from `dz`, the gradient by the logits of `rows`, whose hidden states are `h`; `w_VH` is the
        weight in their dtype."""
        if self.db_V is not None:
            self.db_V += dz.sum(0)
        dz = dz.to(h.dtype)
        if self.dh_NH is not None:
            torch.mm(dz, w_VH, out=self.dh_NH[rows])
        if self.dw_VH is not None:
            self.dw_VH += dz.T @ h

    def save(self, ctx: Any) -> None:
        grads = (self.dh_NH, None if self.dw_VH is None else self.dw_VH.to(self.dtype), self.db_V)
        ctx.present = [g is not None for g in grads]
        ctx.save_for_backward(*[g for g in grads if g is not None])

    @staticmethod
    def saved(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
        """The three, in the backward, for a loss whose own gradient is `upstream`."""
        saved = iter(ctx.saved_tensors)
        return [next(saved) * upstream if there else None for there in ctx.present]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        scale: float,
        softcap: float | None,
        compiled: bool,
        dft: bool,
        z_loss: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(h_NH.dtype, torch.float32)
        w = weight_VH.to(h_NH.dtype)
        chunk = chunk_rows(w.shape[0], h_NH.device)
        total, nll, squares = torch.zeros(3, dtype=wide, device=h_NH.device).unbind()
        gradients = HeadGradients(ctx, h_NH, weight_VH)
        softmax = _softmax(compiled, h_NH)
        with torch.autocast(h_NH.device.type, enabled=False):
            for start in range(0, h_NH.shape[0], chunk):
                rows = slice(start, start + chunk)
                h, y, weights = h_NH[rows], targets_N[rows, None], weights_N[rows].to(wide)
                z = h @ w.T
                if softmax is not None:
                    total += softmax(z, targets_N[rows], weights, scale, gradients.wanted).sum()
                    gradients.add(rows, h, w, z)
                    continue
                z = z.to(wide)
                if bias_V is not None:
                    z += bias_V
                if scale != 1.0:
                    z *= scale
                if softcap is not None:
                    z = z.div_(softcap).tanh_().mul_(softcap)
                lse = torch.logsumexp(z, dim=-1)
                logps = z.gather(1, y)[:, 0] - lse
                nll -= (logps * weights).sum()
                squares += (lse.square() * weights).sum()
                factors = weights * logps.exp() if dft else weights
                total -= (logps * factors).sum()
                if not gradients.wanted:
                    continue
                slope = 1.0 - (z / softcap).square() if softcap is not None else None
                dz = z.sub_(lse[:, None]).exp_()
                if z_loss:
                    dz *= (factors + 2 * z_loss * lse * weights)[:, None]
                    dz.scatter_add_(1, y, -factors[:, None])
                    dz *= scale
                else:
                    dz.scatter_add_(1, y, torch.full_like(y, -1, dtype=wide))
                    dz *= factors[:, None] * scale
                if slope is not None:
                    dz *= slope
                gradients.add(rows, h, w, dz)
        gradients.save(ctx)
        if softmax is not None:
            nll = total.clone()
        if z_loss:
            total = total + z_loss * squares
        ctx.mark_non_differentiable(nll, squares)
        return total, nll, squares

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (*HeadGradients.saved(ctx, grad_outputs[0]), None, None, None, None, None, None, None)


def _softmax(wanted: bool, h: Tensor) -> Callable[..., Tensor] | None:
    """The compiled form for h's device and dtype, or None."""
    if not (wanted and runs_compiled(h)):
        return None
    from tunery.kernels import compiled

    return compiled.cross_entropy
