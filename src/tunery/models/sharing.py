"""Whether a model may compute what sequences begin with alike once (data/collate.py, kernels/shared_keys.py).

It may where nothing but attention looks back, and attention goes through our hook. A state that is handed on from token
to token, or a convolution, would begin anew with each piece; a model's own attention would know nothing of what a piece
continues. So it is tried."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tunery.data.collate import collate
from tunery.types import Batch, Tokens

PROMPT, LENGTH = 20, 32


def both_ways(
    own: Callable[[Tensor], Tensor], ours: Callable[[Batch], Tensor], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """What a model makes, token by token, of one prompt with two answers: from one stream that has the prompt once (by
    `ours`), and from the two whole sequences (by `own`). [T, N] each, whatever N is; raises what they raise."""
    ids = (np.arange(2 * LENGTH) * 7919 + 3) % vocabulary
    sequences = [ids[:LENGTH], np.concatenate([ids[:PROMPT], ids[LENGTH:]])]
    trained = [(np.arange(len(sequence)) >= PROMPT).astype(np.float32) for sequence in sequences]
    stream = collate([Tokens(s, t) for s, t in zip(sequences, trained, strict=True)], rows=[0, 0], share=True)
    shared, *_ = stream.lengths
    first, second = (own(torch.from_numpy(sequence)) for sequence in sequences)
    return ours(stream), torch.cat([first, second[shared:]])
