"""Oracle: every example once an epoch, counted by hand; the same step whatever was asked before."""

from __future__ import annotations

import pytest

from tunery.data.order import Order, epoch_order


def order_of(examples: int = 37, seed: int = 1, shuffle: bool = True) -> Order:
    return Order(examples, batch_size=8, seed=seed, shuffle=shuffle)


def test_an_epoch_is_every_row_once_and_the_next_another_order():
    order = order_of()
    assert order.steps_per_epoch == 5
    first, second = ([row for step in range(e * 5, e * 5 + 5) for row in order.rows(step)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(37)) and first != second
    assert (first, second) == tuple(epoch_order(37, 1, epoch, True).tolist() for epoch in (0, 1))
    assert [len(order.rows(step)) for step in range(6)] == [8, 8, 8, 8, 5, 8]


def test_passes_over_the_examples():
    order = order_of()
    assert (order.epoch_at(5), order.epoch_at(1), order.epoch_at(12)) == (1.0, 8 / 37, 2 + 16 / 37)


def test_without_shuffling_every_epoch_is_in_the_order_of_the_examples():
    order = Order(5, batch_size=2, seed=1, shuffle=False)
    assert [order.rows(step) for step in range(5)] == [[0, 1], [2, 3], [4], [0, 1], [2, 3]]


def test_a_step_is_the_same_whatever_was_asked_before():
    forth, back = order_of(), order_of()
    steps = [forth.rows(step) for step in range(12)]
    assert [back.rows(step) for step in reversed(range(12))] == steps[::-1]
    assert [order_of(seed=2).rows(step) for step in range(12)] != steps


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 2])
def test_the_step_of_an_example(shuffle, epoch):
    order = order_of(shuffle=shuffle)
    expected = {row: step for step in range(5 * epoch, 5 * epoch + 5) for row in order.rows(step)}
    assert {example: order.step_of(example, epoch) for example in range(37)} == expected


def test_fewer_examples_than_a_step_takes():
    order = order_of(3)
    assert order.steps_per_epoch == 1 and sorted(order.rows(4)) == [0, 1, 2] and order.epoch_at(4) == 4.0
