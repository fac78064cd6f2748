"""Oracle: curves made here, whose trouble (or lack of it) is known because it was put in."""

import math
import random

import pytest

from tunery.diagnose import DataCounts, diagnose
from tunery.history import Evaluation, History, Step


def schedule(n, warmup=0.03, peak=1e-4):
    warm = max(1, int(warmup * n))
    return [peak * min((i + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, i - warm) / n))) for i in range(n)]


def steps(losses, lrs=None, norms=None, weights=None):
    lrs = lrs or schedule(len(losses))
    return [
        Step(
            step=i + 1,
            loss=loss,
            weight=weights[i] if weights else 100,
            lr=lrs[i],
            grad_norm=norms[i] if norms else 1.0,
            tokens=400,
            examples=16,
            epoch=(i + 1) / 100,
            seconds=0.1,
            elapsed=0.1 * i,
        )
        for i, loss in enumerate(losses)
    ]


def kinds(history, counts=None, total_steps=None):
    total = total_steps or len(history.steps)
    return [diagnosis.kind for diagnosis in diagnose(history, counts, total_steps=total)]


def only(history, counts=None, total_steps=None):
    found = diagnose(history, counts, total_steps=total_steps or len(history.steps))
    assert len(found) == 1, found
    return found[0]


def noisy(rng, value, noise):
    return max(1e-3, value * math.exp(noise * rng.gauss(0, 1)))


# ------------------------------------------------------------ no false alarms


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 0.8])
def test_an_ordinary_falling_curve_is_never_remarked_on(noise):
    """Looked at fifty times while it grows, as a run is, with warm-up, epochs' drops and a jittering evaluation."""
    rng = random.Random(f"falling {noise}")
    for _ in range(15):
        n = rng.choice([20, 60, 100, 300])
        floor, height, pace = rng.uniform(0.1, 2), rng.uniform(0.5, 4), rng.uniform(0.03, 0.5) * n
        epochs = rng.choice([1, 3])
        level = [(floor + height * math.exp(-i / pace)) * 0.8 ** (i * epochs // n) for i in range(n)]
        curve = steps([noisy(rng, value, noise) for value in level], schedule(n, rng.choice([0.0, 0.03, 0.1])))
        held_out = [
            Evaluation(at, (floor + height * math.exp(-at / pace)) * (1 + rng.gauss(0, 0.004)), at / 100, 0.0)
            for at in range(n // 5, n + 1, n // 5)
        ]
        for end in range(1, n + 1, max(1, n // 50)):
            history = History(curve[:end], [evaluation for evaluation in held_out if evaluation.step <= end])
            assert kinds(history, total_steps=n) == []


def test_a_slow_but_falling_curve_is_not_called_flat():
    rng = random.Random(1)
    for _ in range(50):
        n = rng.choice([100, 300])
        curve = steps([noisy(rng, 1.2 * (1 - 0.08 * i / n), 0.05) for i in range(n)])
        assert kinds(History(curve)) == []


def test_a_flat_start_is_not_judged_before_the_warm_up_is_over():
    n = 1000
    curve = steps([2.5] * 300, schedule(n, warmup=0.4))
    assert kinds(History(curve), total_steps=n) == []


def test_a_noisy_evaluation_is_not_overfitting():
    falling = steps([2 * math.exp(-i / 50) for i in range(100)])
    jitter = [Evaluation(at, 1.0 + 0.01 * (at // 20 % 2), 1.0, 0.0) for at in range(20, 101, 20)]
    assert kinds(History(falling, jitter)) == []


def test_evaluation_and_training_rising_together_is_not_overfitting():
    rising = steps([1 + 0.001 * i for i in range(100)])
    worse = [Evaluation(at, 1 + 0.005 * at, 1.0, 0.0) for at in range(20, 101, 20)]
    assert "overfitting" not in kinds(History(rising, worse))


def test_a_few_hard_rows_are_not_a_high_learning_rate():
    losses = [1 + math.exp(-i / 30) for i in range(200)]
    losses[50] = losses[90] = losses[91] = losses[160] = 12.0
    assert kinds(History(steps(losses))) == []


def test_a_hard_stretch_now_and_then_is_not_a_high_learning_rate():
    rng = random.Random(6)
    losses = [
        noisy(rng, (1 + math.exp(-i / 30)) * (1.6 if i % 60 in (50, 51, 52, 53) else 1), 0.02) for i in range(300)
    ]
    assert kinds(History(steps(losses))) == []


# ------------------------------------------------------------ trouble is found


def test_overfitting_names_the_best_step_and_the_values():
    rng = random.Random(2)
    curve = steps([noisy(rng, 0.2 + 2 * math.exp(-i / 60), 0.1) for i in range(200)])
    held_out = [Evaluation(at, 1 + (at / 200 - 0.4) ** 2, at / 100, 0.0) for at in range(20, 201, 20)]
    diagnosis = only(History(curve, held_out))
    assert diagnosis.kind == "overfitting"
    assert diagnosis.evidence["best_step"] == 80
    assert diagnosis.evidence["last_eval_loss"] == pytest.approx(1.36)
    assert diagnosis.evidence["train_loss_now"] < diagnosis.evidence["train_loss_then"]
    assert "step 80" in diagnosis.message and "1.0000" in diagnosis.message and "1.3600" in diagnosis.message


def test_overfitting_shows_with_an_evaluation_per_epoch():
    curve = steps([1.0] * 50 + [0.6] * 50)
    assert kinds(History(curve, [Evaluation(50, 1.0, 1, 0.0), Evaluation(100, 1.1, 2, 0.0)])) == ["overfitting"]
    assert kinds(History(curve, [Evaluation(50, 1.0, 1, 0.0), Evaluation(100, 1.03, 2, 0.0)])) == []


def test_held_out_rows_of_another_kind_only_get_worse():
    curve = steps([2 * math.exp(-i / 50) for i in range(100)])
    worse = [Evaluation(at, 3 + at / 100, at / 100, 0.0) for at in range(0, 101, 50)]
    diagnosis = only(History(curve, worse))
    assert diagnosis.kind == "overfitting" and diagnosis.evidence["best_step"] == 0
    assert "another kind" in diagnosis.message


@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_divergence_is_a_learning_rate_too_high(noise):
    rng = random.Random(3)
    level = [1 + 2 * math.exp(-i / 20) + (0 if i < 80 else 5 * (1 - math.exp((80 - i) / 20))) for i in range(200)]
    norms = [1.0 if i < 80 else 40.0 for i in range(200)]
    diagnosis = only(History(steps([noisy(rng, value, noise) for value in level], norms=norms)))
    assert diagnosis.kind == "learning rate too high"
    assert 40 <= diagnosis.evidence["lowest_step"] <= 90
    assert diagnosis.evidence["now"] > 4 * diagnosis.evidence["lowest"]
    assert "norm grew from 1 to 40" in diagnosis.message


def test_thrown_off_in_the_warm_up_and_never_back():
    rng = random.Random(4)
    losses = [noisy(rng, 2.0 if i < 8 else 7.0, 0.1) for i in range(150)]
    diagnosis = only(History(steps(losses)))
    assert diagnosis.kind == "learning rate too high"
    assert diagnosis.evidence["lowest_step"] <= 3


def test_leaping_up_again_and_again():
    losses = [1 + (6 * math.exp(-(i % 50) / 6) if i > 40 else 0) for i in range(300)]
    diagnosis = only(History(steps(losses)))
    assert diagnosis.kind == "learning rate too high"
    assert diagnosis.evidence["leaps"] == pytest.approx([50, 100, 150, 200, 250], abs=2)


def test_a_loss_or_gradient_that_is_no_number():
    curve = steps([1.0] * 10)
    curve[6].grad_norm = math.inf
    diagnosis = only(History(curve))
    assert diagnosis.kind == "learning rate too high" and diagnosis.evidence["step"] == 7


def test_a_flat_curve_is_not_learning():
    rng = random.Random(5)
    diagnosis = only(History(steps([noisy(rng, 2.5, 0.05) for _ in range(150)])))
    assert diagnosis.kind == "not learning"
    assert diagnosis.evidence["first"] == pytest.approx(2.5, rel=0.03)
    assert diagnosis.evidence["lr"] == pytest.approx(1e-4, rel=0.01)


def test_loss_near_zero_at_once():
    diagnosis = only(History(steps([0.004] * 60)))
    assert diagnosis.kind == "loss near zero at once" and diagnosis.evidence["level"] == pytest.approx(0.004)
    resumed = steps([0.004] * 60)
    for step in resumed:
        step.step += 500
    assert kinds(History(resumed)) == []  # a curve that starts late may well have come down before


def test_zero_labelled_tokens():
    some = only(History(steps([1.0] * 20, weights=[100] * 10 + [0] * 2 + [100] * 8)))
    assert some.kind == "zero labelled tokens" and some.evidence == {"steps": 2, "of": 20, "first": 11}
    none = only(History(), DataCounts(read=5, used=5, tokens=900, labelled=0, eval_rows=1))
    assert none.kind == "zero labelled tokens" and "900" in none.message


def test_dropped_and_truncated_rows():
    refused = {"empty answer": 3, "too long": 40}
    counts = DataCounts(read=1000, used=957, refused=refused, truncated=96, tokens=9, labelled=9, eval_rows=9)
    dropped, truncated = diagnose(History(), counts)
    assert (dropped.kind, truncated.kind) == ("dropped rows", "truncated answers")
    assert "43 of 1,000 rows (4.3%)" in dropped.message and "too long: 40, empty answer: 3" in dropped.message
    assert "96 of 957 rows (10.0%)" in truncated.message and truncated.evidence["share"] == pytest.approx(96 / 957)
    few = DataCounts(read=1000, used=995, refused={"empty answer": 5}, truncated=5, tokens=9, labelled=9, eval_rows=9)
    assert diagnose(History(), few) == []


def test_no_evaluation_is_a_note():
    counts = DataCounts(read=10, used=10, tokens=90, labelled=9)
    assert only(History(), counts).kind == "no evaluation"
    assert only(History(), counts).level == "note"
    assert diagnose(History(evaluations=[Evaluation(0, 1.0, 0.0, 0.0)]), counts) == []
