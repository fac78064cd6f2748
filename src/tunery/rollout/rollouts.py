"""Steps made of what the policy itself says: prompts in the data's order, a group of answers to each, their rewards,
and then batches as any other objective has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunery.data.collate import collate
from tunery.data.loader import Cut, Step, make_step, streams
from tunery.data.order import epoch_order
from tunery.data.store import TokenStore
from tunery.engine import Engine
from tunery.errors import TuneryError
from tunery.generate.base import Generator, Request, Sampling
from tunery.objectives._generated import places
from tunery.policy import CausalPolicy
from tunery.rollout.figures import Figures, figures_of, is_equal
from tunery.rollout.log import RolloutLog
from tunery.rollout.options import RolloutConfig
from tunery.rollout.samples import load_groups, make_sample, runs, save_groups
from tunery.rollout.scoring import Rewards
from tunery.types import Batch, Example, Sample

STATE = "rollout.pt"
Group = list[Sample]


def sampling_of(options: RolloutConfig, seed: int = 0) -> Sampling:
    """How the answers of a rollout are sampled."""
    return Sampling(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
        top_k=options.top_k, seed=seed,
    )  # fmt: skip


class Rollouts:
    """A loader whose steps depend on the weights: `step(n)` must be asked for when the weights are those after n steps.

    `batch_size` prompts make a rollout, of which `options.minibatches * options.iterations` steps are made. Its answers
    are a pure function of (weights, seed, number of the rollout), so a run resumed between two generates the next one
    again; within one, the checkpoint holds it (`save`, `load`). Every rank generates its share, and has all of it.

    `objective`: an Objective with `judge`, and perhaps `measure` (objectives/_generated.py). Measured besides, where
    several steps are made of a rollout, is `old_logps`: the policy's own log-probabilities, by the forward that trains.
    Samples' Tokens.extra has before `judge`: what was measured, `generated_logps` (the generator's), and `limit`,
    rollout.max_new_tokens."""

    live = True
    longest = None  # not known beforehand

    def __init__(
        self, options: RolloutConfig, store: TokenStore, examples: Sequence[Example], *, batch_size: int, seed: int,
        shuffle: bool, how: Cut, objective: Any, policy: CausalPolicy, generator: Generator, rewards: Rewards,
        engine: Engine, log: RolloutLog,
    ):  # fmt: skip
        self.options, self.store, self.examples = options, store, examples
        self.batch_size, self.seed, self.shuffle, self.how = batch_size, seed, shuffle, how
        self.objective, self.policy, self.generator, self.rewards = objective, policy, generator, rewards
        self.engine, self.log = engine, log
        self.steps_per_rollout = options.minibatches * options.iterations
        self.steps_per_epoch = math.ceil(len(store) / batch_size) * self.steps_per_rollout
        self.groups: list[Group] = []
        self._made: int | None = None
        self._figures: Figures = {}

    # ------------------------------------------------------------ the loader's face

    def rows(self, rollout: int) -> list[int]:
        """The examples that a rollout asks: epochs follow one another without a gap, so that each is full."""
        first, count = rollout * self.batch_size, len(self.store)
        orders: dict[int, np.ndarray] = {}
        found = []
        for epoch, place in (divmod(number, count) for number in range(first, first + self.batch_size)):
            if epoch not in orders:
                orders[epoch] = epoch_order(count, self.seed, epoch, self.shuffle)
            found.append(int(orders[epoch][place]))
        return found

    def step(self, step: int) -> Step:
        """Step `step` (0-based), of a rollout that is made now where it is the first of it."""
        rollout, within = divmod(step, self.steps_per_rollout)
        if self._made != rollout:
            self._make(rollout, step)
        chosen = self.groups
        if self.options.minibatches > 1:
            iteration, part = divmod(within, self.options.minibatches)
            order = self._random(rollout, 1, iteration).permutation(len(chosen))
            chosen = [chosen[i] for i in np.array_split(order, self.options.minibatches)[part]]
        examples = [run for group in chosen for run in runs(group, self.how)]
        return make_step([[s.tokens for s in run] for run in examples], [run[0].row for run in examples], self.how)

    def largest_stream(self, start: int, total: int) -> tuple[Batch | None, bool]:
        """Nobody knows before it is generated."""
        return None, False

    def epoch_at(self, step: int) -> float:
        """Passes over the prompts after `step` steps."""
        return step / self.steps_per_rollout * self.batch_size / len(self.store)

    # ------------------------------------------------------------ beyond it

    def take_figures(self) -> Figures:
        """Metrics of the rollout made since they were taken last: of all ranks, and on the first one alone."""
        figures, self._figures = self._figures, {}
        return figures if self.engine.is_main else {}

    def answered(self, store: TokenStore, examples: Sequence[Example]) -> list[Sample]:
        """The likeliest answer to each of these prompts, scored: those of all ranks, on every rank."""
        sampling = Sampling(max_new_tokens=self.options.max_new_tokens)
        mine = {row: row for row in range(self.engine.rank, len(store), self.engine.world)}
        samples = self._together(store, examples, mine, sampling)
        return [samples[row] for row in range(len(store))]

    def save(self, folder: Path, step: int) -> None:
        """Beside a checkpoint after `step` steps: the rollout, where further steps are made of it."""
        if step % self.steps_per_rollout and self._made is not None:
            save_groups(folder / STATE, self._made, self.groups)

    def load(self, folder: Path) -> None:
        """What `save` wrote there, if anything."""
        if (folder / STATE).is_file():
            self._made, self.groups = load_groups(folder / STATE)

    def close(self) -> None:
        """End the generator, the processes of rewards, and the log."""
        self.generator.close()
        self.rewards.close()
        self.log.close()

    # ------------------------------------------------------------ making a rollout

    def _make(self, rollout: int, step: int) -> None:
        groups = self._answered(rollout, 0, self.rows(rollout))
        figures = figures_of(groups)
        if self.options.resample:
            groups, asked = self._resampled(rollout, groups)
            figures["rollout/resampled"] = (float(asked), 1.0)
        self._measure(groups)
        figures |= self.objective.judge(groups)
        if self.engine.is_main:
            self.log.add(step + 1, groups)
        if self.options.mask_truncated:
            for sample in (sample for group in groups for sample in group if sample.answer.finish == "length"):
                sample.tokens.weights[:] = 0.0
        self.groups, self._made, self._figures = groups, rollout, figures

    def _resampled(self, rollout: int, groups: list[Group]) -> tuple[list[Group], int]:
        """The groups whose rewards differ, filled up with answers to further prompts for so many rounds (dynamic
        sampling, DAPO, arXiv:2503.14476, section 3.2), and how many prompts that took. Where too few differ to give
        each minibatch one, equal ones stay."""
        kept = [group for group in groups if not is_equal(group)]
        equal = [group for group in groups if is_equal(group)]
        used = {group[0].row for group in groups}
        asked = 0
        for number in range(1, self.options.resample + 1):
            order = self._random(rollout, 2, number).permutation(len(self.store)).tolist()
            rows = [row for row in order if row not in used][: len(groups) - len(kept)]
            if not rows:
                break
            used.update(rows)
            asked += len(rows)
            fresh = self._answered(rollout, number, rows)
            kept += [group for group in fresh if not is_equal(group)]
            equal += [group for group in fresh if is_equal(group)]
        return kept + equal[: max(0, self.options.minibatches - len(kept))], asked

    def _answered(self, rollout: int, turn: int, rows: Sequence[int]) -> list[Group]:
        """A group of scored samples for each of `rows`. Numbers of answers, and so their random numbers, are those of
        their place in the rollout and its `turn`."""
        options, size = self.options, self.options.group
        sampling = sampling_of(options, int(np.random.SeedSequence([self.seed, rollout]).generate_state(1)[0]))
        starts = [(turn * self.batch_size + place) * size for place in range(len(rows))]
        mine = range(self.engine.rank, len(rows), self.engine.world)
        numbers = {starts[place] + k: rows[place] for place in mine for k in range(size)}
        samples = self._together(self.store, self.examples, numbers, sampling)
        return [[samples[start + k] for k in range(size)] for start in starts]

    def _together(
        self, store: TokenStore, examples: Sequence[Example], numbers: dict[int, int], sampling: Sampling
    ) -> dict[int, Sample]:
        """All ranks' scored samples by number, of this rank's `numbers` and the rows they answer. What one rank raises
        is raised on all."""
        made: dict[int, Sample] = {}
        error: TuneryError | None = None
        try:
            prompts = {row: store.sequences(row)[0].ids for row in set(numbers.values())}
            requests = [Request(ids=prompts[row].tolist(), number=number) for number, row in numbers.items()]
            self.generator.sync()
            with self.policy.autocast():  # frozen and trained parameters may differ in dtype
                completions = {c.index: c for c in self.generator.generate(requests, sampling)}
            made = {
                number: make_sample(row, examples[row], prompts[row], completions[number], sampling.max_new_tokens)
                for number, row in numbers.items()
            }
            self.rewards.score(list(made.values()))
        except TuneryError as problem:
            error = problem
        everyone = self.engine.gather((made, error))
        for _, problem in everyone:
            if problem is not None:
                raise problem
        return {number: sample for samples, _ in everyone for number, sample in samples.items()}

    def _measure(self, groups: Sequence[Group]) -> None:
        """What the policy as it is says of the answers' tokens, into their Tokens.extra; each rank asks a share."""
        if self.steps_per_rollout == 1 and not hasattr(self.objective, "measure"):
            return
        samples = {(g, k): sample for g, group in enumerate(groups) for k, sample in enumerate(group)}
        found: list[tuple[tuple[int, int], str, np.ndarray]] = []
        model = self.policy.model
        was_training = model.training
        model.eval()
        try:
            for keys, batch in self._streams(groups):
                with torch.no_grad():
                    values = self._measured(batch.to(self.engine.device))
                for name, values_T in values.items():
                    apart = values_T[batch.labelled_N.to(values_T.device)].cpu().split(batch.labelled_S.tolist())
                    found += [(key, name, values_n.numpy()) for key, values_n in zip(keys, apart, strict=True)]
        finally:
            model.train(was_training)
        for everyone in self.engine.gather(found):
            for key, name, values_n in everyone:
                tokens = samples[key].tokens
                tokens.extra[name] = np.zeros(len(tokens), dtype=values_n.dtype)
                tokens.extra[name][places(tokens)] = values_n

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        measure = getattr(self.objective, "measure", None)
        values = dict(measure(self.policy, batch)) if measure is not None else {}
        if self.steps_per_rollout > 1 and "old_logps" not in values:
            values["old_logps"] = self.policy.logps(batch)
        return values

    def _streams(self, groups: Sequence[Group]) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
        """This rank's groups as streams, and which samples each holds."""
        how = Cut(self.how.budget, self.how.packing, share=self.how.share)
        examples: list[list[tuple[tuple[int, int], Sample]]] = []
        for g in range(self.engine.rank, len(groups), self.engine.world):
            keyed = iter(enumerate(groups[g]))
            examples += [[((g, next(keyed)[0]), sample) for sample in run] for run in runs(groups[g], how)]
        lengths = [sum(len(sample.tokens) for _, sample in example) for example in examples]
        for members in streams(lengths, how):
            chosen = [pair for i in members for pair in examples[i]]
            rows = [key[0] for key, _ in chosen]
            yield [key for key, _ in chosen], collate([s.tokens for _, s in chosen], rows, share=how.share)

    def _random(self, rollout: int, purpose: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, rollout, purpose, number]))
