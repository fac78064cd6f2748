"""Oracle: the loader that trains."""

from __future__ import annotations

import numpy as np
import pytest

from tunery.data.loader import Cut, Loader
from tunery.data.store import Chunk, TokenStore, pack_store
from tunery.job import load_job
from tunery.plan.work import AssumedRows, work_of
from tunery.types import Tokens


def rows(count: int = 40) -> TokenStore:
    """Examples of one or two sequences."""
    random = np.random.default_rng(1)

    def tokens() -> Tokens:
        n = int(random.integers(5, 60))
        return Tokens(np.arange(n, dtype=np.int32), (random.random(n) < 0.5).astype(np.float32))

    examples = [[tokens() for _ in range(1 + i % 2)] for i in range(count)]
    return pack_store([Chunk(examples, [(0, 0, i) for i in range(count)])], ["x"])


def job(**train):
    return load_job({"data": {"train": "x"}, "train": {"batch_size": 7, "epochs": 2, **train}})


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_the_steps_are_those_of_the_loader(packing, world):
    store, budget = rows(), 128
    work = work_of(job(packing=packing), store, budget, world)
    loader = Loader(store, batch_size=7, seed=42, shuffle=True, how=Cut(budget, packing, 0, world))
    steps = [loader.step(i) for i in range(loader.steps_per_epoch)]
    assert work.streams == [[batch.n_tokens for batch in step.micro] for step in steps]
    assert work.steps == 2 * loader.steps_per_epoch
    assert work.tokens == np.mean([step.tokens for step in steps])
    batches = [batch for step in steps for batch in step.micro]
    assert work.largest.tokens == max(batch.n_tokens for batch in batches)
    assert (list(work.largest.lengths), work.largest.labelled) in [(b.lengths, len(b.labelled_N)) for b in batches]
    assert work.accumulates == any(len(step.micro) > 1 for step in steps)


def test_rows_nobody_read_are_as_long_as_they_may_be():
    work = work_of(job(), AssumedRows(7, 1024), 2048)
    assert work.steps is None and work.tokens == 7 * 1024
    assert work.streams == [[2048, 2048, 2048, 1024]] and work.largest.lengths == (1024, 1024)
    assert work_of(job(max_steps=5), AssumedRows(7, 1024), 2048).steps == 5


def test_a_typical_stream_has_the_rows_lengths():
    work = work_of(job(), AssumedRows(7, 100), 2048)
    assert work.typical(250).lengths == (100, 100, 50) and work.typical(250).labelled == round(0.99 * 250)
    assert work.typical(40).lengths == (40,)


def test_pairs_stay_whole_and_share_their_prompt():
    random = np.random.default_rng(2)

    def pair(prompt: int) -> list[Tokens]:
        head = random.integers(0, 99, prompt)
        made = []
        for n in (3, 9):
            ids = np.concatenate([head, random.integers(100, 999, n)]).astype(np.int32)
            made.append(Tokens(ids, np.repeat([0.0, 1.0], [prompt, n]).astype(np.float32)))
        return made

    examples = [pair(20 + i) for i in range(12)]
    store = pack_store([Chunk(examples, [(0, 0, i) for i in range(12)])], ["x"])
    work = work_of(job(), store, 128)
    assert work.per_example == 2 and work_of(job(), rows(), 128).per_example == 1
    for tokens in (30, 75, 200):
        lengths = work.typical(tokens).lengths
        assert sum(lengths) == tokens and len(lengths) % 2 == 0
    stream = work.largest
    pairs = len(stream.lengths) // 3
    assert stream.sequences == 2 * pairs and stream.continues == tuple(
        before for i in range(pairs) for before in (-1, 3 * i, 3 * i)
    )
    assert stream.apart.continues == () and stream.apart.tokens == stream.tokens
    assert len(stream.apart.lengths) == stream.sequences
