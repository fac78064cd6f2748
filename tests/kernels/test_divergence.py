"""Oracles: all logits at once with autograd, TRL's generalised Jensen-Shannon loss, and numbers worked by hand, in
float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tunery.kernels import linear_cross_entropy
from tunery.kernels.divergence import LazyLogits, Mixture, divergence, reference, top_k_divergence

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def random_head(n: int, v: int, h: int, seed: int, **how: Any) -> LazyLogits:
    torch.manual_seed(seed)
    bias = torch.randn(v, dtype=torch.float64) if how.pop("bias", False) else None
    return LazyLogits(torch.randn(n, h).double(), v, torch.randn(v, h).double(), bias, **how)


def trained(head: LazyLogits) -> tuple[LazyLogits, list[torch.Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (head.h_NH, head.weight_VH, head.bias_V) if x is not None]
    return LazyLogits(leaves[0], head.vocabulary, leaves[1], (*leaves, None)[2], head.scale, head.softcap), leaves


def behind_a_wrapper(head: LazyLogits) -> LazyLogits:
    """The same logits by a head that is any function."""
    return LazyLogits(head.h_NH, head.vocabulary, head=head.of)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("how", [{}, {"bias": True}, {"scale": 0.5, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("vocabulary", [41, 43, 47])  # the teacher's; the student's is 43
def test_value_and_gradients_equal_the_reference(monkeypatch, beta, how, vocabulary):
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_LOGITS", {"cpu": 90 * 4})  # several chunks
    monkeypatch.setattr(linear_cross_entropy, "FEWEST_ROWS", 1)
    student, teacher = random_head(19, 43, 8, 0, **dict(how)), random_head(19, vocabulary, 6, 1)
    targets, weights = torch.randint(0, 41, (19,)), torch.rand(19).double() * 2
    mixture = Mixture(beta, 1.7, 0.3)
    results = []
    for function, change in ((divergence, None), (reference, None), (divergence, behind_a_wrapper)):
        head, leaves = trained(student)
        made = function(change(head) if change else head, teacher, targets, weights, mixture)
        (made.total * 0.7).backward()
        results.append([*(x.detach() for x in made), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for mine, expected in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    teacher, mixture = random_head(3, 5, 4, 1), Mixture(beta, 0.8, 0.5)
    targets, weights = torch.tensor([0, 4, 2]), torch.tensor([1.0, 0.5, 2.0]).double()

    def total(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return divergence(LazyLogits(h, 5, w), teacher, targets, weights, mixture).total

    _, leaves = trained(random_head(3, 5, 4, 0))
    assert torch.autograd.gradcheck(total, tuple(leaves), atol=1e-8)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.9, 2.0])
def test_trls_generalised_jsd(beta, temperature):
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = random_head(11, 29, 8, 0), random_head(11, 29, 8, 1)
    made = divergence(student, teacher, torch.zeros(11).long(), torch.ones(11), Mixture(beta, temperature))
    z, z_teacher = student.of(student.h_NH), teacher.of(teacher.h_NH)
    theirs = GKDTrainer.generalized_jsd_loss(z, z_teacher, beta=beta, temperature=temperature, reduction="sum")
    torch.testing.assert_close(made.total, theirs, rtol=1e-10, atol=1e-10)


def test_by_hand():
    """The student says (1/2, 1/2), the teacher (1/4, 3/4); the target is 0, and the row weighs 2."""
    eye = torch.eye(2, dtype=torch.float64)
    student = LazyLogits(torch.zeros(1, 2).double(), 2, eye)
    teacher = LazyLogits(torch.tensor([[0.0, math.log(3)]]).double(), 2, eye)

    def value(beta: float, sft_weight: float = 0.0) -> float:
        made = divergence(student, teacher, torch.tensor([0]), torch.tensor([2.0]), Mixture(beta, 1.0, sft_weight))
        assert float(made.nll) == pytest.approx(2 * math.log(2))
        return float(made.total)

    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert value(0.0) == pytest.approx(2 * forward, rel=1e-6)
    assert value(1.0) == pytest.approx(2 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), rel=1e-6)
    middle = (0.375, 0.625)
    between = 0.25 * math.log(0.25 / middle[0]) + 0.75 * math.log(0.75 / middle[1])
    between += 0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
    assert value(0.5) == pytest.approx(between, rel=1e-6)
    assert value(0.0, 3.0) == pytest.approx(2 * forward + 6 * math.log(2), rel=1e-6)


def test_a_teacher_that_says_the_same_teaches_nothing():
    head, leaves = trained(random_head(7, 13, 4, 0))
    for beta in BETAS:
        made = divergence(head, random_head(7, 13, 4, 0), torch.zeros(7).long(), torch.ones(7), Mixture(beta, 2.0))
        made.total.backward()
        assert abs(float(made.total.detach())) < 1e-12
    assert all(leaf.grad is not None and leaf.grad.abs().max() < 1e-12 for leaf in leaves)


def test_no_rows_and_no_gradient():
    empty, leaves = trained(random_head(0, 13, 4, 0))
    none = torch.zeros(0)
    for head in (empty, behind_a_wrapper(empty)):
        made = divergence(head, random_head(0, 13, 4, 1), none.long(), none, Mixture(0.5))
        made.total.backward()
        assert made.total == 0
    assert leaves[0].grad is not None and leaves[0].grad.shape == (0, 4)
    head, _ = trained(random_head(3, 13, 4, 0))
    with torch.no_grad():
        made = divergence(head, random_head(3, 13, 4, 1), torch.zeros(3).long(), torch.ones(3), Mixture(0.5))
    assert not made.total.requires_grad


def test_bfloat16_stays_near_float64():
    student, teacher = random_head(64, 200, 64, 0), random_head(64, 200, 64, 1)
    low = [LazyLogits((x.h_NH / 8).bfloat16(), 200, x.weight_VH.bfloat16()) for x in (student, teacher)]  # type: ignore[union-attr]
    high = [LazyLogits(x.h_NH.double(), 200, x.weight_VH.double()) for x in low]  # type: ignore[union-attr]
    rough, exact = (
        divergence(mine, other, torch.zeros(64).long(), torch.ones(64), Mixture(0.5)).total
        for mine, other in (low, high)
    )
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=0.02)


# ------------------------------------------------------------ of the teacher's likeliest tokens alone


def likeliest(teacher: LazyLogits, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logps, ids = teacher.of(teacher.h_NH).log_softmax(-1).topk(k, -1)
    return ids, logps


@pytest.mark.parametrize("beta", BETAS)
def test_all_but_one_of_the_likeliest_are_the_whole_distribution(monkeypatch, beta):
    """The one token that is left is the only one in its event."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_LOGITS", {"cpu": 13 * 6})  # several chunks
    monkeypatch.setattr(linear_cross_entropy, "FEWEST_ROWS", 1)
    teacher, targets, weights = random_head(7, 13, 4, 1), torch.randint(0, 13, (7,)), torch.rand(7).double()
    results = []
    for whole in (True, False):
        head, leaves = trained(random_head(7, 13, 4, 0))
        mixture = Mixture(beta, 1.0, 0.3)
        if whole:
            made = divergence(head, teacher, targets, weights, mixture)
        else:
            made = top_k_divergence(head, *likeliest(teacher, 12), targets, weights, mixture)
        made.total.backward()
        results.append([*(x.detach() for x in made), *(leaf.grad for leaf in leaves)])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)  # LEAST


def test_the_likeliest_by_hand():
    """The student says (1/2, 1/4, 1/4); of the teacher it is known that it says 3/4 for token 0."""
    z = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    student = LazyLogits(z, 3, torch.eye(3, dtype=torch.float64))
    given = torch.tensor([[0]]), torch.tensor([[0.75]], dtype=torch.float64).log()
    made = top_k_divergence(student, *given, torch.tensor([1]), torch.tensor([2.0]), Mixture(0.0))
    assert float(made.total) == pytest.approx(2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    assert float(made.nll) == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck_of_the_likeliest(beta):
    given, targets = likeliest(random_head(3, 7, 4, 1), 3), torch.tensor([0, 4, 2])

    def total(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return top_k_divergence(LazyLogits(h, 7, w), *given, targets, torch.ones(3), Mixture(beta)).total

    _, leaves = trained(random_head(3, 7, 4, 0))
    assert torch.autograd.gradcheck(total, tuple(leaves), atol=1e-8)
