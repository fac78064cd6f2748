"""Oracle: the beginnings that sequences share, one example after the other, by comparing tokens in a loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.data import share
from tunery.data.collate import collate
from tunery.data.share import WORTH_SHARING, shared_length
from tunery.data.store import Chunk, TokenStore, pack_store
from tunery.types import Tokens


def by_definition(sequences: list[Tokens]) -> int:
    """All but the last of the tokens that all have in common before any is trained."""
    if len(sequences) < 2:
        return 0
    common = 0
    while all(common < len(t) and t.ids[common] == sequences[0].ids[common] for t in sequences):
        if common and any(t.weights[common] for t in sequences):
            break
        common += 1
    return common - 1 if common - 1 >= WORTH_SHARING else 0


@st.composite
def examples(draw):
    """Of one to four sequences that begin alike for a while, of few different tokens."""
    prompt = draw(st.lists(st.integers(0, 3), min_size=1, max_size=14))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        ids = prompt + draw(st.lists(st.integers(0, 1), max_size=6))
        trained_from = draw(st.integers(0, len(ids)))
        weights = (np.arange(len(ids)) >= trained_from).astype(np.float32)
        result.append(Tokens(np.array(ids, np.int32), weights))
    return result


def stored(rows: list[list[Tokens]]) -> TokenStore:
    return pack_store([Chunk(rows, [(0, 0, n + 1) for n in range(len(rows))])], ["rows.jsonl"])


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(examples(), min_size=1, max_size=8), at_once=st.sampled_from([1, 30, 1000]))
def test_a_store_knows_what_a_stream_of_each_example_holds(rows, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share, "_AT_ONCE", at_once)
        lengths = stored(rows).lengths_when_shared
    for sequences, length in zip(rows, lengths, strict=True):
        assert shared_length(sequences) == by_definition(sequences)
        assert length == collate(sequences, [0] * len(sequences), share=True).n_tokens


def test_a_view_of_a_store_has_the_lengths_of_what_it_shows():
    prompt = np.arange(20, dtype=np.int32)
    pair = [Tokens(np.append(prompt, n).astype(np.int32), np.eye(21, dtype=np.float32)[20]) for n in (100, 101)]
    alone = [Tokens(prompt, np.ones(20, np.float32))]
    store = stored([alone, pair, alone])
    assert store.lengths_when_shared.tolist() == [20, 42 - 19, 20]
    assert store.select([1, 2, 1]).lengths_when_shared.tolist() == [23, 20, 23]
