"""Rollouts from a job: what can be wrong with its sections together, its rewards, and the loader itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tunery.config import build
from tunery.data.dataset import Prepared
from tunery.data.loader import Cut
from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import ConfigError
from tunery.generate import vllm
from tunery.generate.base import Generator
from tunery.generate.hf import HFGenerator
from tunery.job import Job
from tunery.models.load import base_source
from tunery.policy import CausalPolicy
from tunery.rewards import Host
from tunery.rollout.log import RolloutLog
from tunery.rollout.rollouts import Rollouts, sampling_of
from tunery.rollout.samples import make_answer
from tunery.rollout.scoring import Rewards


def generates(objective: Any) -> bool:
    return bool(getattr(objective, "generates", False))


def check_rollouts(job: Job, objective: Any) -> None:
    """Raises ConfigError where objective, rewards and rollout do not go together."""
    kind, rollout = job.objective.kind, job.rollout
    if not generates(objective):
        if job.rewards:
            raise ConfigError(f"rewards: objective {kind} trains on the answers in the data and has no use for rewards")
        return
    if not job.rewards and getattr(objective, "needs_rewards", True):
        raise ConfigError(f"rewards: objective {kind} needs one at least; for example my_rewards.py:accuracy, or math")
    if rollout.minibatches > job.train.batch_size:
        raise ConfigError(
            f"rollout.minibatches: {rollout.minibatches} minibatches cannot be made of {job.train.batch_size} prompts "
            "(train.batch_size)"
        )
    least = getattr(objective, "least_group", 1)
    if rollout.group < least:
        raise ConfigError(
            f"rollout.group: objective {kind} compares the answers to a prompt with one another and needs {least}"
        )
    if rollout.generator == "vllm":
        vllm.check(sampling_of(rollout), job.model.dtype)


def check_generator(job: Job) -> None:
    """Raises ConfigError where the job's generator is not installed."""
    if job.rollout.generator == "vllm" and generates(build("objectives", job.objective)):
        vllm.check_installed()


def check_device(job: Job, objective: Any, engine: Engine) -> None:
    """Raises ConfigError where the generator does not run where the policy trains."""
    if generates(objective) and job.rollout.generator == "vllm":
        vllm.check_device(engine.device.type)


def make_rewards(job: Job, data: Prepared) -> Rewards:
    """The job's rewards, ready, and found able to score these rows. Raises ConfigError and RewardError."""
    rewards = Rewards(job.rewards)
    rewards.check([make_answer(example) for example in [*data.train_examples, *data.eval_examples]])
    try:
        rewards.start()
    except ConfigError:
        rewards.close()
        raise
    return rewards


def load_rewards(job: Job, rewards: Rewards, model: Any, adapter: Any, tokenizer: Any, template: Any) -> list[str]:
    """Load what is large of the rewards beside the policy's `model`, on its base weights where they are what they were
    loaded as and stay so; what is to be said of it. Raises ModelError."""
    changed = None
    if adapter.whole:
        changed = f"adapter: {job.adapter.kind} trains the base itself"
    elif adapter.changes_base:
        changed = "PiSSA takes the adapter's start out of the policy's"
    return rewards.load(Host(model, base_source(job.model), changed, tokenizer, template))


def make_rollouts(
    job: Job, data: Prepared, objective: Any, policy: CausalPolicy, tokenizer: Any, template: Any, rewards: Rewards,
    engine: Engine, cut: Cut, start: int,
) -> tuple[Rollouts, int]:  # fmt: skip
    """The loader, and the number of optimizer steps of the whole run."""
    train, options = job.train, job.rollout
    assert isinstance(data.train, TokenStore)
    steps_per_rollout = options.minibatches * options.iterations
    rollouts = math.ceil(train.epochs * len(data.train) / train.batch_size - 1e-9)
    total = train.max_steps or rollouts * steps_per_rollout
    policy.temperature = options.temperature
    generator = make_generator(job, data, policy, tokenizer, template, engine)
    made = Rollouts(
        options, data.train, data.train_examples, batch_size=train.batch_size, seed=train.seed, shuffle=train.shuffle,
        how=cut, objective=objective, policy=policy, generator=generator, rewards=rewards, engine=engine,
        log=RolloutLog(Path(job.output), options.shown, start, total),
    )  # fmt: skip
    return made, total


def make_generator(
    job: Job, data: Prepared, policy: CausalPolicy, tokenizer: Any, template: Any, engine: Engine
) -> Generator:
    """Of the policy's answers, with the probabilities of their tokens. Raises ModelError where vLLM does not start."""
    options = job.rollout
    if options.generator == "hf":
        return HFGenerator(policy.model, tokenizer, template, batch_tokens=options.batch_tokens, logps=True)
    stores = [store for store in (data.train, data.eval) if isinstance(store, TokenStore)]
    longest = max(int(store.lengths.max()) for store in stores) + options.max_new_tokens
    return vllm.VLLMGenerator(
        policy.model, tokenizer, template, source=job.model, dtype=engine.dtype, world=engine.world, longest=longest,
        memory=options.vllm_memory, sleeps=options.vllm_sleep, mode=vllm.logprobs_mode(sampling_of(options)),
        seed=job.train.seed,
    )  # fmt: skip
