"""Oracles: numbers worked by hand; the sums of the papers, term by term; and the padded forms in which TRL has written
advantages and losses ([answers, longest] with a mask), on the same numbers in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny_models import tiny_model
from tunery.data.collate import collate
from tunery.errors import ConfigError, ModelError
from tunery.job import load_job
from tunery.models.value_head import load_value_head, make_value_head, save_value_head
from tunery.objectives._generated import places, put
from tunery.objectives.ppo import Config, Moments, Objective, gae, value_losses, whiten
from tunery.policy import CausalPolicy
from tunery.types import Answer, Sample, Tokens

LENGTHS = [3, 5, 1, 4]
COUNT = sum(LENGTHS)
PROMPT = 4


def sample(reward: float | None, count: int, row: int = 0) -> Sample:
    ids = np.arange(PROMPT + count, dtype=np.int32) + 1
    weights = np.r_[np.zeros(PROMPT), np.ones(count)].astype(np.float32)
    return Sample(row, Tokens(ids, weights), Answer((), "", ids[PROMPT:], "stop"), {}, reward)


def measured(seed: int = 0, rewards=(1.0, 0.2, -0.4, 0.6)) -> list[Sample]:
    """Four answers and what was measured of them."""
    rng = np.random.default_rng(seed)
    samples = [sample(reward, length, row) for row, (reward, length) in enumerate(zip(rewards, LENGTHS, strict=True))]
    for one, length in zip(samples, LENGTHS, strict=True):
        old = -rng.uniform(0.1, 3, length)
        put(one.tokens, "old_logps", old)
        put(one.tokens, "reference_logps", old + rng.normal(0, 0.5, length))
        put(one.tokens, "generated_logps", old + rng.normal(0, 0.1, length))
        put(one.tokens, "values", rng.normal(0, 1, length))
    return samples


def flat(samples: list[Sample], name: str) -> np.ndarray:
    return np.concatenate([one.tokens.extra[name][places(one.tokens)] for one in samples])


def padded(values_N) -> torch.Tensor:
    rows = torch.as_tensor(values_N).split(LENGTHS)
    return torch.stack([torch.nn.functional.pad(row, (0, max(LENGTHS) - len(row))) for row in rows])


MASK = padded(torch.ones(COUNT, dtype=torch.float64))


def mean(values: torch.Tensor) -> torch.Tensor:
    return (values * MASK).sum() / MASK.sum()


def whitened(values: torch.Tensor, shift: bool = True) -> torch.Tensor:
    centre = mean(values)
    variance = mean((values - centre) ** 2) * MASK.sum() / (MASK.sum() - 1)
    return (values - centre) / (variance + 1e-8).sqrt() + (0 if shift else centre)


# ---------------------------------------------------------------- advantages


def test_advantages_by_hand():
    # d = 0 + 0.5 * 2 - 1, 0 + 0.5 * 4 - 2, 3 - 4; A_t = d_t + 0.25 A_{t+1}
    found = gae(np.array([0.0, 0.0, 3.0]), np.array([1.0, 2.0, 4.0]), gamma=0.5, decay=0.5)
    assert found.tolist() == [-0.0625, -0.25, -1.0]


@pytest.mark.parametrize(("gamma", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_papers_sum(gamma, decay):
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=6), rng.normal(size=6)
    beyond = np.r_[v, 0.0]
    errors = [r[t] + gamma * beyond[t + 1] - v[t] for t in range(6)]
    expected = [sum((gamma * decay) ** k * errors[t + k] for k in range(6 - t)) for t in range(6)]
    assert gae(r, v, gamma, decay) == pytest.approx(expected, rel=1e-12)
    if decay == 1:  # what was got, less what was expected
        assert gae(r, v, gamma, decay) == pytest.approx(r[::-1].cumsum()[::-1] - v)


def test_whitening_by_hand():
    assert whiten(np.array([1.0, 2.0, 3.0])) == pytest.approx([-1, 0, 1])
    assert whiten(np.array([1.0, 2.0, 3.0]), shift=False) == pytest.approx([1, 2, 3])
    assert whiten(np.array([5.0])).tolist() == [0.0] and whiten(np.full(3, 2.0)).tolist() == [0.0] * 3


CASES = {
    "plain": {},
    "no divergence": {"beta": 0.0},
    "whitened rewards": {"whiten_rewards": True, "beta": 0.2},
    "discounted": {"gamma": 0.9, "gae_lambda": 0.7, "beta": 0.1},
    "as they are": {"whiten_advantages": False},
    "clipped": {"score_clip": 0.5},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_and_returns_are_those_of_the_padded_form(name, seed):
    config, samples = Config(**CASES[name]), measured(seed)
    Objective(config).judge([samples[:1], samples[1:]])
    scores = torch.tensor([one.reward for one in samples], dtype=torch.float64)
    scores = scores.clamp(-0.5, 0.5) if config.score_clip else scores
    rewards = -config.beta * (padded(flat(samples, "old_logps")) - padded(flat(samples, "reference_logps")))
    rewards[torch.arange(4), torch.tensor(LENGTHS) - 1] += scores
    values = padded(flat(samples, "values"))
    rewards = whitened(rewards, shift=False) * MASK if config.whiten_rewards else rewards
    columns, later = [], torch.zeros(4, dtype=torch.float64)
    for t in reversed(range(max(LENGTHS))):
        after = values[:, t + 1] if t + 1 < max(LENGTHS) else 0.0
        later = rewards[:, t] + config.gamma * after - values[:, t] + config.gamma * config.gae_lambda * later
        columns.append(later)
    advantages = torch.stack(columns[::-1], dim=1)
    returns = advantages + values
    advantages = whitened(advantages) if config.whiten_advantages else advantages
    assert flat(samples, "advantages") == pytest.approx(advantages[MASK.bool()].numpy(), rel=1e-9, abs=1e-12)
    assert flat(samples, "returns") == pytest.approx(returns[MASK.bool()].numpy(), rel=1e-9, abs=1e-12)


def test_figures_of_a_rollout():
    samples = measured()
    figures = {name: total / weight for name, (total, weight) in Objective(Config(beta=0.3)).judge([samples]).items()}
    kl = flat(samples, "old_logps") - flat(samples, "reference_logps")
    returns, values = flat(samples, "returns"), flat(samples, "values")
    assert figures["kl"] == pytest.approx(kl.mean()) and figures["kl/answer"] == pytest.approx(kl.sum() / 4)
    assert figures["beta"] == 0.3 and figures["returns/mean"] == pytest.approx(returns.mean())
    assert figures["explained_variance"] == pytest.approx(1 - (returns - values).var() / returns.var())


def test_an_answer_without_a_reward_is_in_no_number():
    samples, alone = measured(rewards=(1.0, None, -0.4, 0.6)), measured()
    del alone[1]
    Objective(Config()).judge([samples])
    Objective(Config()).judge([alone])
    assert samples[1].tokens.labelled == 0
    assert flat(samples, "advantages") == pytest.approx(flat(alone, "advantages"))
    assert Objective(Config()).judge([[sample(None, 2)]]) == {}


# ---------------------------------------------------------------- from rollout to rollout


def test_beta_follows_the_target():
    """Ziegler et al., section 2.2: too far by 20 % at most counts; e / horizon of it for each answer."""
    objective = Objective(Config(beta=0.1, kl_target=2.0, kl_horizon=100))
    samples = [sample(0.0, 2), sample(0.0, 2)]
    betas = []
    for distance in (1.1, 50.0, 0.0):  # of a token; 2 tokens in an answer
        for one in samples:
            put(one.tokens, "old_logps", -1.0)
            put(one.tokens, "reference_logps", -1.0 - distance)
            put(one.tokens, "values", 0.0)
        betas.append(objective.judge([samples])["beta"][0])
    betas.append(objective.beta)
    expected = [0.1, 0.1 * (1 + 0.1 * 2 / 100)]
    expected += [expected[1] * (1 + 0.2 * 2 / 100)]
    expected += [expected[2] * (1 - 0.2 * 2 / 100)]
    assert betas == pytest.approx(expected, rel=1e-12)
    many = Objective(Config(beta=0.1, kl_target=2.0, kl_horizon=0.1))  # 1 - 0.2 * 2 / 0.1 would turn the sign
    many.judge([samples])
    assert many.beta == pytest.approx(0.1 * 0.8, rel=1e-12)


def test_rewards_are_normalised_by_all_so_far_and_that_is_kept():
    rng = np.random.default_rng(3)
    parts, moments = [rng.normal(5, 2, n) for n in (1, 7, 4)], Moments()
    for number, part in enumerate(parts, 1):
        moments.add(part)
        seen = np.concatenate(parts[:number])
        assert moments.mean == pytest.approx(seen.mean())
        assert moments.deviation == pytest.approx(seen.std(ddof=1) if len(seen) > 1 else 0.0)
    objective = Objective(Config(score_norm=True, beta=0.0, gae_lambda=1.0, whiten_advantages=False))
    objective.judge([measured()])
    resumed = Objective(objective.config)
    resumed.load_state(objective.state())
    samples, again = measured(1, (3.0, 1.0, 0.0, 2.0)), measured(1, (3.0, 1.0, 0.0, 2.0))
    objective.judge([samples])
    resumed.judge([again])
    assert flat(samples, "returns").tolist() == flat(again, "returns").tolist()
    seen = np.array([1.0, 0.2, -0.4, 0.6, 3.0, 1.0, 0.0, 2.0])
    expected = (np.array([3.0, 1.0, 0.0, 2.0]) - seen.mean()) / seen.std(ddof=1)
    assert flat(samples, "returns") == pytest.approx(expected.repeat(LENGTHS))


# ---------------------------------------------------------------- the loss


def stub(logps_N: torch.Tensor, values_N: torch.Tensor) -> SimpleNamespace:
    def spread(batch, x_N):
        return torch.zeros(batch.n_tokens, dtype=torch.float64).index_put((batch.labelled_N,), x_N)

    return SimpleNamespace(logps_and_values=lambda batch: (spread(batch, logps_N), spread(batch, values_N)))


def now(samples: list[Sample], seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and values that have moved, far enough that some are clipped."""
    rng = np.random.default_rng(seed)
    return tuple(  # type: ignore[return-value]
        torch.tensor(flat(samples, name) + rng.normal(0, 0.3, COUNT), requires_grad=True)
        for name in ("old_logps", "values")
    )


@pytest.mark.parametrize("clip", [0.2, None])
def test_loss_and_gradients_are_those_of_the_padded_form(clip):
    samples = measured()
    objective = Objective(Config(value_clip=clip, value_weight=0.3, clip_high=0.25))
    objective.judge([samples])
    logps, values = now(samples)
    batch = collate([one.tokens for one in samples])
    loss = objective.loss(stub(logps, values), batch)
    mine = loss.sum / objective.weight(batch)
    A, G, old, before = (padded(flat(samples, n)) for n in ("advantages", "returns", "old_logps", "values"))
    ratio, v = (padded(logps) - old).exp(), padded(values)
    policy = mean(torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.25)))
    squares = (v - G) ** 2
    if clip is not None:
        squares = torch.maximum(squares, (torch.minimum(torch.maximum(v, before - clip), before + clip) - G) ** 2)
    theirs = policy + 0.3 * 0.5 * mean(squares)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, [logps, values]) for x in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert a.abs().max() > 1e-3
    figures = {name: float(total) / float(weight) for name, (total, weight) in loss.metrics.items()}
    assert figures["policy_loss"] == pytest.approx(float(policy.detach()))
    assert figures["approx_kl"] == pytest.approx(float(mean((padded(logps.detach()) - old) ** 2)) / 2)
    assert figures["clip_ratio/low"] + figures["clip_ratio/high"] == pytest.approx(
        float(mean((-A * ratio.clamp(0.8, 1.25) > -A * ratio).double()))
    )
    assert (figures["clip_ratio/value"] > 0) == (clip is not None)


def test_value_losses_by_hand():
    """It may not get better by leaping: clipped at 0.2 from 0, it is still 0.8 off; leaping away counts in full."""
    v, G, before = torch.tensor([[0.9, -0.5, 0.1], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    losses, beyond = value_losses(v, G, before, 0.2)
    assert losses.tolist() == pytest.approx([0.32, 1.125, 0.405]) and beyond.tolist() == [1, 0, 0]
    assert value_losses(v, G, before, None)[0].tolist() == pytest.approx([0.005, 1.125, 0.405])


def test_the_sum_is_that_of_its_parts():
    samples = measured()
    objective = Objective(Config(correction=2.0))
    objective.judge([samples])
    logps, values = now(samples)
    whole = objective.loss(stub(logps, values), collate([one.tokens for one in samples])).sum
    parts = [
        objective.loss(stub(x, y), collate([one.tokens])).sum
        for one, x, y in zip(samples, logps.split(LENGTHS), values.split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


# ---------------------------------------------------------------- the value head


def test_one_forward_gives_both_and_both_train_the_backbone(tmp_path):
    policy = CausalPolicy(tiny_model(), dtype=torch.float64)
    head = policy.value_head = make_value_head(policy.parts, torch.float64, "cpu")
    batch = collate([one.tokens for one in measured()])
    logps, values = policy.logps_and_values(batch)
    torch.testing.assert_close(logps, policy.logps(batch))
    assert values.count_nonzero() == 0  # it begins at 0
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    _, values = policy.logps_and_values(batch)
    assert policy.parts is not None
    hidden = policy.parts.backbone(input_ids=batch.ids_T[None, : PROMPT + 3]).last_hidden_state[0]
    torch.testing.assert_close(values[PROMPT - 1 : PROMPT + 2], head(hidden)[PROMPT - 1 : PROMPT + 2, 0])
    assert values[: PROMPT - 1].count_nonzero() == 0 and values.count_nonzero() == COUNT
    values.sum().backward()
    assert head.weight.grad is not None
    assert all(p.grad is not None for n, p in policy.parts.backbone.named_parameters() if "layers.0" in n)
    save_value_head(head, tmp_path)
    again = make_value_head(policy.parts, torch.float64, "cpu", tmp_path)
    assert again.weight.equal(head.weight)
    with pytest.raises(ModelError, match="is not the value head of this model"):
        load_value_head(torch.nn.Linear(3, 1), tmp_path)
    with pytest.raises(ModelError, match="a value head needs a model that is a backbone"):
        make_value_head(None, torch.float64, "cpu")


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="beta must be above 0"):
        load_job({"data": {"train": "x"}, "rewards": "math", "objective": {"kind": "ppo", "beta": 0, "kl_target": 6}})
    assert Objective(Config()).reference and not Objective(Config(beta=0)).reference
