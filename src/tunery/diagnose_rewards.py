"""What a run's numbers say, in words, where it learns from rewards: the signs of a reward that is hacked, cannot be
learned from, or is learned already. Rules as in diagnose.py: each finds its trouble and is silent without it.

Metrics are those of rollout/figures.py and objectives/_clipping.py, one value for each rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from tunery.diagnose import ENOUGH, DataCounts, Diagnosis, data_losses, no_evaluation
from tunery.history import History, Step

REWARD, LENGTH, CUT = "reward", "completions/mean_length", "completions/clipped_ratio"
ENTROPY, KL, EQUAL, DIFFERENCE = "entropy", "kl", "frac_reward_zero_std", "rollout/difference"
TOLERANCE = 0.05  # mean difference of a token's log-probability between engine and generator that rounding may cause
READ = "Read what it says in rollouts.jsonl."


def learns_from_rewards(history: History) -> bool:
    return any(REWARD in step.metrics for step in history.steps[:2])


def diagnose_rewards(history: History, counts: DataCounts | None = None) -> list[Diagnosis]:
    """Everything there is to say."""
    steps = history.steps
    found = [
        *(data_losses(counts) if counts else ()),
        generator_differs(steps),
        nothing_counts(steps),
        equal_groups(steps),
        length_drift(steps),
        entropy_collapse(steps),
        kl_blow_up(steps),
        reward_stays(steps),
        no_evaluation(history, counts),
    ]
    return [diagnosis for diagnosis in found if diagnosis is not None]


def nothing_counts(steps: Sequence[Step]) -> Diagnosis | None:
    """In more than half of the steps no token counted, because every answer was left out; or no reward ever applied."""
    empty = [step for step in steps if not step.weight or not step.metrics.get(ENTROPY, (0.0, 1.0))[1]]
    if steps and 2 * len(empty) > len(steps):
        share = len(empty) / len(steps)
        return Diagnosis(
            "nothing trained",
            f"In {share:.0%} of the steps every answer was left out, so nothing was learned (their loss is nan): those "
            "that are cut off, with rollout.mask_truncated, or that no reward applies to. Raise "
            f"rollout.max_new_tokens, or see what the rewards return. {READ}",
            {"share": share},
        )
    rewards = [step.metrics[REWARD] for step in steps if REWARD in step.metrics]
    scored = any(name.startswith("rewards/") for step in steps for name in step.metrics)
    if scored and rewards and not any(weight for _, weight in rewards):
        return Diagnosis(
            "nothing trained",
            f"No reward applied to any answer (all of them returned None), so there was nothing to learn from. {READ}",
            {"rewards": 0.0},
        )
    return None


def equal_groups(steps: Sequence[Step]) -> Diagnosis | None:
    """More than nine in ten groups have answers that are all worth the same: in the first five rollouts, where nothing
    can begin to be learned, or the newest five."""
    shares, rewards = _curve(steps, EQUAL), _curve(steps, REWARD)
    if len(shares) < 5 or len(rewards) < 5:
        return None
    start, now = fmean(shares[:5]), fmean(shares[-5:])
    if start > 0.9 and len(shares) < 2 * ENOUGH and now > 0.9:
        return Diagnosis(
            "all groups equal",
            f"In {start:.0%} of the groups all answers are worth the same (mean reward {fmean(rewards[:5]):.3g}), so "
            "there is nothing to prefer and almost nothing to learn from. The reward may be too hard or too easy for "
            "this model: make it finer, train on the answers first (objective: sft), raise rollout.group or "
            "rollout.temperature, or set rollout.resample.",
            {"share": start, "reward": fmean(rewards[:5])},
        )
    if now > 0.9:
        return Diagnosis(
            "all groups equal",
            f"In {now:.0%} of the newest groups all answers are worth the same (mean reward {fmean(rewards[-5:]):.3g}; "
            f"at the start {start:.0%}). If that is as good as it gets, the run is done; else set rollout.resample, or "
            "train on harder prompts.",
            {"share": now, "at_start": start, "reward": fmean(rewards[-5:])},
            level="note",
        )
    return None


def length_drift(steps: Sequence[Step]) -> Diagnosis | None:
    """Answers are twice as long as at the start, or half as long, or are mostly cut off where few were."""
    lengths, cut = _curve(steps, LENGTH), _curve(steps, CUT)
    if len(lengths) < 10:
        return None
    start, now = _edges(lengths)
    cut_start, cut_now = _edges(cut) if len(cut) >= 10 else (0.0, 0.0)
    evidence = {"start": start, "now": now, "cut_off_at_start": cut_start, "cut_off": cut_now}
    if cut_now > max(0.5, 2 * cut_start):
        return Diagnosis(
            "length drift",
            f"{cut_now:.0%} of the answers are cut off at rollout.max_new_tokens ({cut_start:.0%} at the start; "
            f"{start:.0f} tokens then, {now:.0f} now). Raise the limit if they need the room, set "
            f"rollout.mask_truncated, or add the length reward with a limit. {READ}",
            evidence,
        )
    if max(now, 8) > 2 * max(start, 4) or now < start / 2:
        way, cure = (
            ("longer", "If length itself is rewarded, by the reward or by loss: grpo, add the length reward or use "
             "loss: dr_grpo.")
            if now > start
            else ("shorter", "If the reward can be had with less, it will be: make it ask for what is missing.")
        )  # fmt: skip
        return Diagnosis(
            "length drift",
            f"The answers have become {way}: {start:.0f} tokens at the start, {now:.0f} now. That is a common sign of "
            f"a reward that is satisfied in another way than it was meant. {cure} {READ}",
            evidence,
        )
    return None


def entropy_collapse(steps: Sequence[Step]) -> Diagnosis | None:
    """The entropy of the next token has fallen below a fifth of what it was."""
    entropies = _curve(steps, ENTROPY)
    if len(entropies) < 10:
        return None
    start, now = _edges(entropies)
    if not (start > 0.02 and now < start / 5):
        return None
    return Diagnosis(
        "entropy collapse",
        f"The policy hardly varies its answers any more: {start:.3f} nats a token at the start, {now:.3f} now. What it "
        "does not try it cannot learn. Raise objective.clip_high (DAPO: 0.28) or rollout.temperature, lower "
        "optimizer.lr, or set objective.beta.",
        {"start": start, "now": now},
    )


def kl_blow_up(steps: Sequence[Step]) -> Diagnosis | None:
    """The policy is more than half a nat a token from where it started, and five times as far as at mid-run."""
    divergences = _curve(steps, KL)
    if len(divergences) < 10:
        return None
    middle, now = fmean(divergences[len(divergences) // 3 : len(divergences) // 2 + 1]), _edges(divergences)[1]
    if not (now > 0.5 and now > 5 * middle):
        return None
    return Diagnosis(
        "kl blow-up",
        f"The policy is running away from where it started: {middle:.3g} nats a token at mid-run, {now:.3g} now. It "
        f"may have found answers that please the reward and nobody else. Lower optimizer.lr or raise objective.beta. "
        f"{READ}",
        {"middle": middle, "now": now},
    )


def generator_differs(steps: Sequence[Step]) -> Diagnosis | None:
    """The engine gives the generated tokens other probabilities than the generator did, by more than rounding."""
    differences = _curve(steps, DIFFERENCE)[-5:]
    if not differences or fmean(differences) <= TOLERANCE:
        return None
    return Diagnosis(
        "generator differs",
        f"Training and generation disagree about the same tokens: their log-probabilities differ by "
        f"{fmean(differences):.3g} on average (up to {TOLERANCE:g} is rounding). Train in float32, or set "
        "objective.correction: 2 to weigh the difference out.",
        {"difference": fmean(differences)},
    )


def reward_stays(steps: Sequence[Step]) -> Diagnosis | None:
    """The reward of the last third is not above that of the first by two standard errors, and groups do differ."""
    rewards, shares = _curve(steps, REWARD), _curve(steps, EQUAL)
    if len(rewards) < 2 * ENOUGH or (shares and fmean(shares) > 0.7):
        return None
    third = len(rewards) // 3
    first, last = rewards[:third], rewards[-third:]
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(third)
    if fmean(last) > fmean(first) + 2 * error:
        return None
    return Diagnosis(
        "reward does not rise",
        f"The reward was {fmean(first):.3g} in the first third of the run and is {fmean(last):.3g} in the last. The "
        "learning rate may be too low or too high, or too little may be trainable (adapter.rank).",
        {"first": fmean(first), "last": fmean(last), "error": error},
    )


def _curve(steps: Sequence[Step], name: str) -> list[float]:
    """A metric's mean in each step that has it."""
    pairs = [step.metrics[name] for step in steps if name in step.metrics]
    return [total / weight for total, weight in pairs if weight and math.isfinite(total)]


def _edges(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and the last fifth."""
    width = max(3, len(values) // 5)
    return fmean(values[:width]), fmean(values[-width:])
