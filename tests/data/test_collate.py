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


def test_answers_to_one_prompt_share_it_up_to_the_token_before_the_first_trained_one():
    prompt = list(range(10, 20))
    one = tokens([*prompt, 1, 2], [0] * 10 + [1, 1], chosen=1, old=np.arange(12.0))
    two = tokens([*prompt, 1, 3, 4], [0] * 10 + [1, 1, 1], chosen=0, old=np.arange(13.0))
    batch = collate([one, two], rows=[7, 7], share=True)
    # pieces: nine tokens of the prompt, then its last token and what each goes on with
    assert batch.lengths == [9, 3, 4] and batch.continues == [-1, 0, 0]
    assert batch.ids_T.tolist() == [*prompt[:9], 19, 1, 2, 19, 1, 3, 4]
    assert batch.positions_T.tolist() == [*range(9), 9, 10, 11, 9, 10, 11, 12]
    assert batch.weights_T.tolist() == [0] * 9 + [1, 1, 0] + [1, 1, 1, 0]
    assert batch.targets_T[batch.labelled_N].tolist() == [1, 2, 1, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 9, 12, 16] and batch.max_seqlen == 9
    assert (batch.n_sequences, batch.labelled_S.tolist(), batch.rows) == (2, [2, 3], [7, 7])
    assert batch.extra["chosen"].tolist() == [1, 0]
    assert batch.extra["old"].tolist() == [*range(9), 9, 10, 11, 9, 10, 11, 12]


@pytest.mark.parametrize(
    "left, right, rows, shared",
    [
        ([0] * 20 + [1], [0] * 20 + [1, 1], [0, 0], 19),
        ([0] * 20 + [1], [0] * 20 + [1, 1], [0, 1], 0),  # other rows are other conversations
        ([0] * 5 + [1] * 16, [0] * 20 + [1], [0, 0], 0),  # one trains the sixth token: too little is left to share
        ([1] + [0] * 19 + [1], [0] * 20 + [1], [0, 0], 19),  # the first token is nobody's target
        ([0] * 12, [0] * 20 + [1], [0, 0], 11),
    ],
)
def test_what_is_shared(left, right, rows, shared):
    make = [tokens(list(range(1, len(weights) + 1)), weights) for weights in (left, right)]
    batch = collate(make, rows=rows, share=True)
    assert batch.lengths == ([shared] if shared else []) + [len(left) - shared, len(right) - shared]
    assert batch.n_sequences == 2 and batch.labelled_S.tolist() == [t.labelled for t in make]


def test_sums_per_sequence_with_a_sequence_that_has_none():
    batch = collate([tokens([5, 6, 7], [0, 1, 1]), tokens([8, 9], [0, 0]), tokens([3, 4], [0, 2])])
    values = torch.tensor([1.0, 10, 100, 1000, 10000, 7, 70], requires_grad=True)
    sums = batch.per_sequence(values)
    assert sums.tolist() == [11, 0, 7]
    (sums * torch.tensor([2.0, 3, 5])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2, 2, 0, 0, 0, 5, 0]
