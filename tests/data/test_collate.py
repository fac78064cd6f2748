"""Oracle: streams written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunery.data.collate import collate
from tunery.types import Tokens


def tokens(ids: list[int], weights: list[float], **extra) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(weights, np.float32), extra)


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


def test_extras_are_carried_beside_the_tokens_and_the_sequences():
    one = tokens([5, 6, 7], [0, 1, 1], logps=np.array([0, -0.5, -1.5], np.float32), chosen=True, margin=0.25)
    two = tokens([8, 9], [0, 1], logps=np.array([0, -2.5], np.float32), chosen=False, margin=1.5)
    batch = collate([one, two])
    assert batch.extra["logps"].tolist() == [0, -0.5, -1.5, 0, -2.5] and batch.extra["logps"].dtype == torch.float32
    assert batch.extra["chosen"].tolist() == [True, False] and batch.extra["chosen"].dtype == torch.bool
    assert batch.extra["margin"].tolist() == [0.25, 1.5]
    assert batch.to("cpu").extra["logps"].tolist() == batch.extra["logps"].tolist()
    assert collate([tokens([5, 6], [0, 1])]).extra == {}


def test_only_truncated_may_be_missing_on_some_sequences():
    plain, cut = tokens([5, 6], [0, 1]), tokens([5, 6], [0, 1], truncated=True)
    assert collate([plain, cut]).extra["truncated"].tolist() == [False, True]
    with pytest.raises(ValueError, match=r"Tokens\.extra\['logps'\]: 1 of the 2 sequences"):
        collate([plain, tokens([5, 6], [0, 1], logps=np.zeros(2))])


@pytest.mark.parametrize("left, right", [(np.zeros(2), 1.0), (np.zeros(3), np.zeros(2)), ("a", "b")])
def test_extras_that_do_not_fit_are_an_error(left, right):
    with pytest.raises(ValueError, match=r"Tokens\.extra\['bad'\]"):
        collate([tokens([5, 6], [0, 1], bad=left), tokens([7, 8], [0, 1], bad=right)])
