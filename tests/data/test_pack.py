"""Oracle: the properties themselves, over seeded random lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tunery.data.pack import best_fit_decreasing, partition


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_everything_once_and_fit(seed):
    lengths = np.random.default_rng(seed).integers(1, 300, 400).tolist()
    bins = best_fit_decreasing(lengths, 512)
    assert Counter(i for b in bins for i in b) == Counter(range(400))
    assert all(sum(lengths[i] for i in b) <= 512 for b in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 512) + 1


def test_the_tightest_bin_is_taken():
    """7+3 and 6+2+2 by hand; the emptier bin for the 3 would leave no room for the last 2."""
    assert best_fit_decreasing([7, 6, 3, 2, 2], 10) == [[0, 2], [1, 3, 4]]


def test_what_is_too_long_stands_alone():
    assert best_fit_decreasing([3, 20, 4], 10) == [[1], [2, 0]]


def test_ranks_get_even_shares_of_everything():
    lengths = np.random.default_rng(0).integers(1, 300, 101).tolist()
    groups = partition(lengths, 4)
    sums = [sum(lengths[i] for i in g) for g in groups]
    assert sorted(i for g in groups for i in g) == list(range(101))
    assert max(sums) - min(sums) <= max(lengths)
    assert all(g == sorted(g) for g in groups)


def test_more_ranks_than_examples():
    assert sorted(map(len, partition([5, 3], 4))) == [0, 0, 1, 1]
