"""Oracles: sizes worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tunery import memory
from tunery.memory import Ledger, Peak, Profile, Span, TooMany

KB = 1024


@pytest.mark.parametrize("fake", [False, True])
def test_the_ledger_follows_memory_and_work(fake):
    ledger = Ledger()
    weight = torch.zeros(16, 16)
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad(), ledger:
        a = torch.zeros(16, 16)  # 1 KB
        ledger.enter_span("one")
        b = a @ a + a  # the product goes when the sum is there
        view = b.t()[:4]
        ledger.enter_span("two")
        del a, b
        assert ledger.live == 1 * KB  # the view keeps it
        del view
        assert ledger.live == 0
        ledger.enter_span("end")
    before, one, two, _ = ledger.spans
    assert (before.end, one.start, one.peak, one.end, two.end) == (KB, KB, 3 * KB, 2 * KB, 0)
    assert one.work == {(False, 2 * 16**3, 3 * KB): 1, (False, 0, 3 * KB): 1, (False, 0, 0): 2}  # the views
    assert two.freed == {"before": KB, "one": KB} and not two.work and not one.products
    assert weight.shape == (16, 16)


def test_products_in_16_bits_are_told_apart_by_their_shapes():
    ledger, low = Ledger(), lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    with ledger:
        ledger.enter_span("one")
        for _ in range(3):
            low(4, 8) @ low(8, 2)
        low(4, 8) @ low(2, 8).t()  # laid out in another way
        ledger.enter_span("two")
        low(4, 8) @ low(8, 2)
        low(5, 8) @ low(8, 2)
        torch.zeros(6, 8) @ torch.zeros(8, 2)
        ledger.note_work(True, 100, 10, operations=5, products=["q k", "p v"])
        ledger.enter_span("end")
    _, one, two, _ = ledger.spans
    assert (len(one.products), len(two.products)) == (2, 4) and two.work[True, 20, 2] == 5
    profile = Profile({span.name: span for span in (one, two)}, [], [], 0, accumulates=False)
    assert profile.products() == 5


def test_memory_made_before_is_counted_when_it_is_shown():
    ledger, weight = Ledger(), torch.zeros(256)
    same = weight.view(16, 16)
    with ledger:
        assert ledger.own([weight, same]) == KB
        weight.add_(1.0)
    assert ledger.live == KB and ledger.spans[0].work == {(False, 0, 2 * KB): 1}


def test_what_has_no_end_in_sight_is_left(monkeypatch):
    monkeypatch.setattr(memory, "MOST_OPERATIONS", 20)
    state = torch.zeros(4)
    with pytest.raises(TooMany, match="one token after the other"), Ledger():
        for _ in range(100):
            state = state * 0.5


def profile(accumulates: bool) -> Profile:
    """Three layers of one kind: 100 kept of each at a rise of 130, 40 of gradients of each and 10 of the head's."""
    forward = Span(("forward", 0), 50, 180, 150)
    forward.freed["embed"] = 0
    head = Span("head", 150, 350, 160)
    backward = Span(("backward", 0), 160, 220, 60 if accumulates else 100)
    tail = Span("tail", backward.end, backward.end, backward.end)
    spans = {s.name: s for s in (Span("embed", 0, 50, 50), forward, head, backward, tail)}
    return Profile(spans, [0, 0, 0], [40, 40, 40], 130, accumulates)


def test_spans_are_strung_together_to_the_whole_depth():
    forward, head, backward = profile(accumulates=False).peaks()
    assert forward == Peak("forward", 0, 350, 0, 30)  # 50 + 3 * 100, and the last layer's rise of 130
    assert head == Peak("head", 0, 350, 200, 0)
    assert backward == Peak("backward", 0, 360, 0, 60)  # the first to go, when all the others' are still there
    assert [p.dynamic for p in profile(accumulates=True).peaks()] == [380 + 130, 550 + 130, 420 + 130]


def test_what_layers_leave_for_the_head_to_free_is_freed_for_every_layer():
    plain = profile(accumulates=False)
    plain.spans["head"].freed[("forward", 0)] = 20
    _, head, backward = plain.peaks()
    assert head == Peak("head", 0, 350 - 3 * 20, 200 + 20, 0)
    assert backward.activations == 350 - 60 + 10 + 20


def test_work_is_counted_for_every_layer():
    plain = profile(accumulates=False)
    plain.spans["embed"].work[False, 0, 8] = 1
    plain.spans[("backward", 0)].work[True, 6, 4] = 2
    assert plain.work() == {(False, 0, 8): 1, (True, 6, 4): 6}
