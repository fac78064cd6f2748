"""Oracles: numbers worked by hand, TRL's GRPOTrainer (its loss on the same log-probs in float64; one step of it on the
same completions), and the definition of each advantage."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tunery.data.collate import collate
from tunery.errors import ConfigError
from tunery.job import load_job
from tunery.objectives._generated import places, put
from tunery.objectives.grpo import Config, Objective
from tunery.types import Answer, Sample, Tokens

LENGTHS = [3, 5, 1, 4]
PROMPT = 4


def sample(reward: float | None, count: int, row: int = 0, limit: int = 6) -> Sample:
    ids = np.arange(PROMPT + count, dtype=np.int32) + 1
    weights = np.r_[np.zeros(PROMPT), np.ones(count)].astype(np.float32)
    return Sample(row, Tokens(ids, weights, {"limit": float(limit)}), Answer((), "", ids[PROMPT:], "stop"), {}, reward)


def group(*rewards: float | None) -> list[Sample]:
    return [sample(reward, LENGTHS[i % 4]) for i, reward in enumerate(rewards)]


def advantages(samples: list[Sample]) -> list[float]:
    """One for each sample; that of all its tokens, and of nothing else."""
    found = []
    for one in samples:
        array = one.tokens.extra["advantages"]
        mine = array[places(one.tokens)]
        assert len(set(mine)) == 1 and np.count_nonzero(array) in (0, len(mine))
        found.append(float(mine[0]))
    return found


def stub(values: dict[str, torch.Tensor]) -> SimpleNamespace:
    """A policy with these log-probabilities of the labelled tokens, [N]."""

    def spread(name: str):
        def logps(batch):
            zeros = torch.zeros(batch.n_tokens, dtype=torch.float64)
            return zeros.index_put((batch.labelled_N,), values[name])

        return logps

    return SimpleNamespace(logps=spread("logps"), reference_logps=spread("reference"))


# ---------------------------------------------------------------- advantages


def test_group_advantages_by_hand():
    samples = group(1.0, 0.0, 0.0, 1.0)
    Objective(Config()).judge([samples])
    expected = 0.5 / ((1 / 3) ** 0.5 + 1e-4)  # four squares of 0.5 over three
    assert advantages(samples) == pytest.approx([expected, -expected, -expected, expected])
    unscaled = group(1.0, 0.0, 0.0, 1.0)
    Objective(Config(scale="none")).judge([unscaled])
    assert advantages(unscaled) == [0.5, -0.5, -0.5, 0.5]


def test_batch_scale_divides_by_one_deviation_for_all():
    groups = [group(1.0, 0.0), group(4.0, 2.0)]
    Objective(Config(scale="batch")).judge(groups)
    spread = np.std([1, 0, 4, 2], ddof=1) + 1e-4
    assert advantages(groups[0] + groups[1]) == pytest.approx([0.5 / spread, -0.5 / spread, 1 / spread, -1 / spread])


def test_rloo_leaves_one_out():
    samples = group(3.0, 0.0, 1.5)
    Objective(Config(advantage="rloo")).judge([samples])
    assert advantages(samples) == pytest.approx([3 - 0.75, 0 - 2.25, 1.5 - 1.5])


def test_equal_groups_and_what_no_reward_applies_to_have_no_advantage():
    samples = group(1.0, 1.0, 1.0)
    Objective(Config()).judge([samples])
    assert advantages(samples) == [0.0, 0.0, 0.0]
    samples = group(1.0, None, 0.0)
    Objective(Config(scale="none")).judge([samples])
    assert advantages(samples) == [0.5, 0.0, -0.5]  # the mean is of the other two
    samples = group(1.0, None)
    Objective(Config()).judge([samples])
    assert advantages(samples) == [0.0, 0.0]


def test_reinforce_plus_plus_takes_the_divergence_from_the_reward_token_by_token():
    one, two = sample(1.0, 2), sample(0.0, 1)
    for s, old in ((one, [-1.0, -2.0]), (two, [-0.5])):
        put(s.tokens, "old_logps", old)
        put(s.tokens, "reference_logps", [-1.5] * len(old))
    Objective(Config(advantage="reinforce++", beta=0.1)).judge([[one], [two]])
    # log p / p_ref: 0.5, -0.5 | 1.0; returns: 1 - 0.1 * (0.5 - 0.5), 1 - 0.1 * -0.5 | 0 - 0.1
    returns = np.array([1.0, 1.05, -0.1])
    normal = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-4)
    assert one.tokens.extra["advantages"][places(one.tokens)] == pytest.approx(normal[:2])
    assert two.tokens.extra["advantages"][places(two.tokens)] == pytest.approx(normal[2:])


# ---------------------------------------------------------------- the loss


def filled(seed: int = 0) -> tuple[list[Sample], dict[str, torch.Tensor]]:
    """Four samples with advantages and old log-probs, and log-probs now: far enough apart to be clipped."""
    rng = np.random.default_rng(seed)
    samples = group(1.0, 0.2, -0.4, 0.6)
    Objective(Config()).judge([samples])
    count = sum(LENGTHS)
    old = -rng.uniform(0.1, 3, count)
    for s, mine in zip(samples, np.split(old, np.cumsum(LENGTHS)[:-1]), strict=True):
        put(s.tokens, "old_logps", mine)
        put(s.tokens, "generated_logps", mine + rng.normal(0, 0.3, len(mine)))
    now = torch.tensor(old + rng.normal(0, 0.3, count), requires_grad=True)
    return samples, {"logps": now, "reference": torch.tensor(old + rng.normal(0, 0.3, count))}


def ours(config: Config, samples: list[Sample], values: dict[str, torch.Tensor]):
    """The loss divided as a step would, and its gradient."""
    objective = Objective(config)
    batch = collate([s.tokens for s in samples], [0] * len(samples))
    loss = objective.loss(stub(values), batch)
    mean = loss.sum / objective.weight(batch)
    (gradient,) = torch.autograd.grad(mean, values["logps"])
    return mean.detach(), gradient, loss.metrics


def theirs(config: dict, samples: list[Sample], values: dict[str, torch.Tensor], limit: int = 6):
    """TRL's loss on the same numbers: its trainer's own method, on a trainer that has only what it reads."""
    trl = pytest.importorskip("trl")
    longest = max(LENGTHS)

    def padded(flat: torch.Tensor) -> torch.Tensor:
        rows = flat.split(LENGTHS)
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])

    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.float64))
    old, generated = (
        padded(torch.tensor(np.concatenate([s.tokens.extra[n][places(s.tokens)] for s in samples])))
        for n in ("old_logps", "generated_logps")
    )
    args = trl.GRPOConfig(output_dir="unused", use_cpu=True, report_to=[], bf16=False)
    model = SimpleNamespace(training=True)
    identity = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(values["logps"]), torch.zeros_like(mask), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0, args=args, model=model, epsilon_low=0.2,
        epsilon_high=0.2, importance_sampling_level="token", loss_type="dapo", use_vllm=False, accelerator=identity,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        max_completion_length=limit, aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    vars(trainer).update(config)
    args.steps_per_generation = 1
    args.use_bias_correction_kl = config.get("use_bias_correction_kl", True)
    inputs = {
        "prompt_ids": torch.ones(4, PROMPT, dtype=torch.long), "prompt_mask": torch.ones(4, PROMPT),
        "completion_ids": mask.long(), "completion_mask": mask, "old_per_token_logps": old,
        "advantages": torch.tensor(advantages(samples), dtype=torch.float64),
        "ref_per_token_logps": padded(values["reference"]), "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": (old - generated).exp().clamp(max=2.0),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, model, inputs)
    (gradient,) = torch.autograd.grad(loss, values["logps"])
    return loss.detach(), gradient, trainer._metrics["train"]


CASES = {
    "grpo": ({"loss": "grpo"}, {"loss_type": "grpo"}),
    "bnpo": ({"loss": "dapo"}, {"loss_type": "bnpo"}),
    "dapo": ({"loss": "dapo", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ({"loss": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "gspo": (
        {"loss": "grpo", "ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "kl": ({"loss": "grpo", "beta": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "plain kl": ({"beta": 0.3, "kl_unbiased": False}, {"beta": 0.3, "use_bias_correction_kl": False}),
    "kl of answers": (
        {"loss": "grpo", "beta": 0.3, "ratio": "sequence"},
        {"loss_type": "grpo", "beta": 0.3, "importance_sampling_level": "sequence"},
    ),
    "kl by tokens": ({"beta": 0.3}, {"beta": 0.3}),
    "corrected": ({"correction": 2.0, "beta": 0.1}, {"use_vllm": True, "beta": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_trls(name, seed):
    mine, trls = CASES[name]
    samples, values = filled(seed)
    loss, gradient, metrics = ours(Config(**mine), samples, values)
    expected, expected_gradient, measured = theirs(trls, samples, values)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-3
    if "ratio" not in mine:
        clipped = sum(float(metrics[f"clip_ratio/{side}"][0]) for side in ("low", "high")) / sum(LENGTHS)
        assert clipped == pytest.approx(measured["clip_ratio/region_mean"][0]) and clipped > 0
    if not mine.get("kl_unbiased", True):
        assert float(metrics["kl"][0]) / metrics["kl"][1] == pytest.approx(measured["kl"][0])


def test_without_old_logps_the_ratio_is_one_and_the_gradient_that_of_the_policy():
    samples, values = filled()
    for s in samples:
        del s.tokens.extra["old_logps"]
    _, gradient, metrics = ours(Config(), samples, values)
    wanted = -np.concatenate([s.tokens.extra["advantages"][places(s.tokens)] for s in samples]) / sum(LENGTHS)
    assert gradient.numpy() == pytest.approx(wanted)
    assert float(metrics["ratio"][0]) == pytest.approx(sum(LENGTHS))
    entropy = -float(values["logps"].detach().sum()) / sum(LENGTHS)
    assert float(metrics["entropy"][0]) / metrics["entropy"][1] == pytest.approx(entropy)


def test_the_generators_difference_is_measured():
    samples, values = filled()
    _, _, metrics = ours(Config(), samples, values)
    old, generated = (
        np.concatenate([s.tokens.extra[n][places(s.tokens)] for s in samples]) for n in ("old_logps", "generated_logps")
    )
    total, count = metrics["rollout/difference"]
    assert float(total) / count == pytest.approx(np.abs(old - generated).mean())
    total, count = metrics["rollout/kl"]
    assert float(total) / count == pytest.approx((np.exp(old - generated) - (old - generated) - 1).mean())


def test_masked_answers_count_as_answers_and_not_as_tokens():
    """As TRL's mask_truncated_completions: their tokens are out of every sum, the answer stays among the answers."""
    samples, values = filled()
    samples[1].tokens.weights[:] = 0.0
    batch = collate([s.tokens for s in samples], [0] * 4)
    assert float(Objective(Config()).weight(batch)) == sum(LENGTHS) - LENGTHS[1]
    assert float(Objective(Config(loss="grpo")).weight(batch)) == 4
    assert float(Objective(Config(loss="dr_grpo")).weight(batch)) == 4 * 6
    kept = {name: torch.cat([v[:3], v[8:]]).detach().requires_grad_() for name, v in values.items()}
    loss = Objective(Config(loss="grpo")).loss(stub(kept), batch)
    assert loss.sum.isfinite()


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_sum_is_that_of_its_parts(loss, ratio):
    """However a step is cut: over all samples in one batch, or one by one."""
    samples, values = filled()
    config = Config(loss=loss, ratio=ratio, beta=0.2)
    objective = Objective(config)
    whole = objective.loss(stub(values), collate([s.tokens for s in samples])).sum
    parts = torch.zeros((), dtype=torch.float64)
    weight = torch.zeros(())
    for number, s in enumerate(samples):
        mine = {name: value.split(LENGTHS)[number] for name, value in values.items()}
        batch = collate([s.tokens])
        parts, weight = parts + objective.loss(stub(mine), batch).sum, weight + objective.weight(batch)
    torch.testing.assert_close(parts, whole)
    assert float(weight) == float(objective.weight(collate([s.tokens for s in samples])))


def test_what_does_not_go_together_is_refused():
    values = {"data": {"train": "x.jsonl"}, "rewards": "math"}
    with pytest.raises(ConfigError, match="advantage rloo has scale none, not group"):
        load_job({**values, "objective": {"kind": "grpo", "advantage": "rloo", "scale": "group"}})
    assert not Objective(Config()).reference and Objective(Config(beta=0.1)).reference
