"""Proof that an exported model is the one that was trained: the same logits on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunery.generate.hf import generating

# Largest relative difference allowed, by the precision of the exported weights. Merging rounds each weight once: 2^-24
# of its size in float32, 2^-11 in float16, 2^-8 in bfloat16, and a forward in low precision rounds as coarsely again.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
STREAMS, LENGTH, SEED = 4, 48, 20240229


@dataclass(frozen=True, slots=True)
class Check:
    """`error`: root mean square of the difference over that of the logits around their mean, over all positions;
    `largest`: the largest absolute difference; `argmax`: share of positions whose likeliest token agrees."""

    error: float
    largest: float
    argmax: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN too

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def probes(vocabulary: int, extra: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Fixed token streams to compare on: seeded random tokens of the vocabulary, and `extra` (real prompts)."""
    random = np.random.default_rng(SEED)
    streams = [random.integers(0, vocabulary, LENGTH).tolist() for _ in range(STREAMS)]
    return streams + [list(ids[:512]) for ids in extra if ids]


@torch.no_grad()
def probe_logits(model: Any, streams: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each stream, float32 [T, V] on the CPU."""
    device = next(model.parameters()).device
    with generating(model):
        return [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in streams]


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> Check:
    """How far the logits `found` are from those `expected`; passed when within the tolerance of `dtype`."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).double()
    spread = torch.cat([(b - b.mean(-1, keepdim=True)).flatten() for b in expected]).double()
    agree = torch.cat([(a.argmax(-1) == b.argmax(-1)).double() for a, b in zip(found, expected, strict=True)])
    scale = spread.square().mean().sqrt().clamp(min=1e-12)
    return Check(
        error=float(difference.square().mean().sqrt() / scale),
        largest=float(difference.abs().max()),
        argmax=float(agree.mean()),
        tolerance=TOLERANCE[dtype],
    )
