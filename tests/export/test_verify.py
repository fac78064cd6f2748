"""Oracle: differences made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_model import random_llama
from tunery.export.verify import compare, probe_logits, probes


def test_error_by_hand():
    """(1, -1) and (13, 7) have a mean square of 5 around their means; 0.1 off in one of four is 0.01 / 4."""
    expected = [torch.tensor([[1.0, -1.0]]), torch.tensor([[13.0, 7.0]])]
    found = [torch.tensor([[1.1, -1.0]]), torch.tensor([[13.0, 7.0]])]
    check = compare(found, expected, torch.float32)
    assert check.error == pytest.approx(math.sqrt(0.0025 / 5))
    assert check.largest == pytest.approx(0.1)
    assert check.argmax == 1.0
    assert not check.passed
    assert compare(expected, expected, torch.float32).passed


def test_agreement():
    expected = [torch.tensor([[0.0, 1.0], [2.0, 1.0]])]
    assert compare([torch.tensor([[1.0, 0.0], [2.0, 1.0]])], expected, torch.float32).argmax == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_never_passes(value):
    expected = [torch.tensor([[1.0, -1.0]])]
    check = compare([torch.tensor([[value, -1.0]])], expected, torch.bfloat16)
    assert not check.passed
    assert not math.isfinite(check.largest)


def test_probes_are_fixed_and_reach_the_whole_vocabulary():
    streams = probes(1000, [[1, 2, 3], []])
    assert streams == probes(1000, [[1, 2, 3]])
    assert streams[-1] == [1, 2, 3]
    random = {token for stream in streams[:-1] for token in stream}
    assert max(random) > 900 and min(random) < 100
    assert all(len(stream) >= 32 for stream in streams[:-1])


def test_rounding_is_within_the_tolerance_and_another_model_is_not():
    model = random_llama(initializer_range=0.02)
    streams = probes(264)
    exact = probe_logits(model, streams)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = random_llama(initializer_range=0.02).to(dtype).float()
        check = compare(probe_logits(rounded, streams), exact, dtype)
        assert check.passed and check.error > 0
    another = random_llama(seed=1, initializer_range=0.02)
    assert not compare(probe_logits(another, streams), exact, torch.bfloat16).passed
