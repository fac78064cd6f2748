"""Oracle: streams written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunery.data.collate import collate
from tunery.types import Tokens


def tokens(ids: list[int], weights: list[float]) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(weights, np.float32))


def test_shift_positions_and_boundaries():
    batch = collate([tokens([5, 6, 7], [0, 1, 0.5]), tokens([8, 9], [1, 2])], rows=[3, 1])
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.targets_T.tolist()[:2] == [6, 7] and batch.targets_T[3] == 9
    # the last position of a sequence predicts nothing, and the first token of one (weight 1 on the 8) is no target
    assert batch.weights_T.tolist() == [1, 0.5, 0, 2, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.cu_seqlens.dtype == torch.int32
    assert batch.labelled_N.tolist() == [0, 1, 3]
    assert (batch.max_seqlen, batch.n_tokens, batch.n_sequences, batch.rows) == (3, 5, 2, [3, 1])


def test_a_sequence_of_one_token_trains_nothing():
    batch = collate([tokens([5], [1]), tokens([6, 7], [1, 1])])
    assert batch.weights_T.tolist() == [0, 1, 0]


def test_nothing_to_pack_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match="at least one"):
        collate([tokens([], [])])
