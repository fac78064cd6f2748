"""Freeze-tuning computes its frozen layers once: the hidden states that enter the first trained layer depend on nothing
but a sequence's own tokens, so those of the first epoch are kept in a file and later epochs begin with them.

The file has one row a token of the training data, in their order. What is kept of a row is what the first epoch
computed, in the stream it computed it in: another stream would round the last bit otherwise. A resumed run therefore
takes up the file as far as it was filled before its checkpoint, and without the file runs those steps through the
frozen layers again, cut as they were; either way the bits are the ones an uninterrupted run would have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunery.data.collate import collate
from tunery.files import write_text
from tunery.models.parts import layer_list
from tunery.types import Batch, Tokens

FILE, MARK = "frozen_states.bin", "frozen_states.steps"
Span = tuple[int, int]  # (first row of the file, rows) of a sequence


class Enough(Exception):
    """The frozen layers have run, and nothing else was asked for."""


def first_trained(model: nn.Module) -> int:
    """Number of layers below the first that trains; all of them where none does. Raises ModelError without layers."""
    layers = layer_list(model)[1]
    trains = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    return trains.index(True) if True in trains else len(layers)


class Boundary:
    """The hidden states between a model's frozen layers and those above, of every training row.

    `lengths` int64 [rows]: tokens of each row, over all its sequences, which stand together in a batch. The states are
    kept in memory, or after `open` in a file. `reading`: whether forwards begin with them, or leave them.
    `trained_below`: whether a gradient was asked for below, so that there is no boundary here."""

    def __init__(self, model: nn.Module, lengths: np.ndarray):
        self.below: list[Any] = list(layer_list(model)[1])[: first_trained(model)]
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.states_TH: Tensor | None = None
        self.reading = self.trained_below = False
        self.outputs = 0  # what a layer returns: a tensor (0), or a tuple of so many with the hidden states first
        self._folder: Path | None = None
        self._under_way: list[tuple[list[Span], Tensor, torch.cuda.Event]] = []

    # ------------------------------------------------------------------ a forward

    @contextmanager
    def around(self, batch: Batch, only: bool = False) -> Iterator[None]:
        """Forwards of the streams of `batch` in here begin above the boundary, or leave there what later ones begin
        with. `only` leaves the forward by `Enough` as soon as that is done. Rows that are not of the training data run
        through."""
        spans = self._spans(batch)
        if spans is None:
            yield
        elif self.reading:
            with _replaced(self.below, [self._pass] * (len(self.below) - 1) + [self._give(spans, batch)]):
                yield
        else:
            with _replaced(self.below[-1:], [self._take(spans, only)]):
                yield

    def _spans(self, batch: Batch) -> list[Span] | None:
        """Where the batch's sequences are, or None where they are not (whole) rows of the training data."""
        if batch.continues:
            return None
        spans: list[Span] = []
        for number, (row, length) in enumerate(zip(batch.rows, batch.lengths, strict=False)):
            follows = number > 0 and batch.rows[number - 1] == row
            if not 0 <= row < len(self.starts) - 1:
                return None
            spans.append((sum(spans[-1]) if follows else int(self.starts[row]), length))
            whole = number + 1 == len(batch.rows) or batch.rows[number + 1] != row
            if whole and sum(spans[-1]) != self.starts[row + 1]:
                return None
        return spans if len(spans) == len(batch.lengths) else None

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """A frozen layer's forward that does nothing."""
        return self._as_output(args[0] if args else kwargs["hidden_states"])

    def _as_output(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden

    def _give(self, spans: list[Span], batch: Batch) -> Callable[..., Any]:
        """The last frozen layer's forward that gives what was kept, of the whole stream or piece by piece."""
        assert self.states_TH is not None
        states = torch.cat([self.states_TH[start : start + length] for start, length in spans])
        if batch.ids_T.is_cuda:
            states = states.pin_memory().to(batch.ids_T.device, non_blocking=True)
        given = 0

        def give(*args: Any, **kwargs: Any) -> Any:
            nonlocal given
            tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
            given += tokens
            return self._as_output(states[None, given - tokens : given])

        return give

    def _take(self, spans: list[Span], only: bool) -> Callable[..., Any]:
        """The last frozen layer's own forward, with its output kept."""
        own, left = self.below[-1].forward, list(spans)

        def take(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            self.outputs = len(output) if isinstance(output, tuple) else 0
            hidden = output[0] if isinstance(output, tuple) else output
            self.trained_below |= hidden.requires_grad
            mine: list[Span] = []
            while sum(length for _, length in mine) < hidden.shape[1]:
                mine.append(left.pop(0))
            self._keep(mine, hidden[0].detach())
            if only:
                raise Enough
            return output

        return take

    # ------------------------------------------------------------------ what is kept

    def _keep(self, spans: list[Span], hidden_TH: Tensor) -> None:
        """Write hidden states to their places. From a GPU they come beside what it computes next."""
        if not hidden_TH.is_cuda:
            self._write(spans, hidden_TH)
            return
        host = torch.empty(hidden_TH.shape, dtype=hidden_TH.dtype, pin_memory=True)
        host.copy_(hidden_TH, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._under_way.append((spans, host, arrived))
        self._settle(but=1)

    def _settle(self, but: int = 0) -> None:
        while len(self._under_way) > but:
            spans, host, arrived = self._under_way.pop(0)
            arrived.synchronize()
            self._write(spans, host)

    def _write(self, spans: list[Span], states_TH: Tensor) -> None:
        if self.states_TH is None:
            self.states_TH = states_TH.new_empty((int(self.starts[-1]), states_TH.shape[1]))
        for (start, length), piece in zip(spans, states_TH.split([n for _, n in spans]), strict=True):
            self.states_TH[start : start + length] = piece

    # ------------------------------------------------------------------ the file

    def open(self, folder: Path, width: int, dtype: torch.dtype, afresh: bool, first: bool = True) -> None:
        """Keep the states, `width` numbers of `dtype` a token, in a file of `folder`. The `first` process to open it
        takes its room on the disk at once and, `afresh`, forgets what another run left there. Raises OSError."""
        self._folder = folder
        size = int(self.starts[-1]) * width * dtype.itemsize
        if first:
            with (folder / FILE).open("ab") as file:
                if afresh or os.fstat(file.fileno()).st_size != size:
                    (folder / MARK).unlink(missing_ok=True)
                    file.truncate(0)
                if hasattr(os, "posix_fallocate"):  # not on a Mac; a full disk would end a process that writes there
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
        mapped = torch.from_file(str(folder / FILE), shared=True, size=size // dtype.itemsize, dtype=dtype)
        self.states_TH = mapped.view(-1, width)

    @property
    def steps(self) -> int:
        """Steps of the first epoch whose states the file is known to hold."""
        mark = self._folder / MARK if self._folder is not None else None
        return int(mark.read_text()) if mark is not None and mark.is_file() else 0

    def mark(self, steps: int, barrier: Callable[[], None], first: bool = True) -> None:
        """All processes, whom `barrier` waits for, have kept what the first `steps` steps gave. It is on the disk
        before that is said, so it holds after a crash of the machine."""
        self._settle()
        barrier()
        if first and self._folder is not None and self.steps != steps:
            with (self._folder / FILE).open("rb") as file:
                os.fsync(file.fileno())
            write_text(self._folder / MARK, str(steps))

    def close(self, first: bool = True) -> None:
        """Remove the file: the run has come to its end."""
        self._under_way.clear()
        self.states_TH = None
        if first and self._folder is not None:
            for name in (MARK, FILE):
                (self._folder / name).unlink(missing_ok=True)


@contextmanager
def _replaced(layers: Sequence[nn.Module], forwards: Iterable[Callable[..., Any]]) -> Iterator[None]:
    """Other forwards on these very modules for a while."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


# ---------------------------------------------------------------- is it exact for this model?

PROBE_LENGTH = 32
_WRONG = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Probed:
    """`why_not`: what forbids a boundary here, or None; the hidden states' `width` and `dtype`."""

    why_not: str | None
    width: int = 0
    dtype: torch.dtype = torch.float32


def probe(policy: Any, close: Callable[[Tensor, Tensor], bool]) -> Probed:
    """Run a CausalPolicy's model on a few tokens, as in training, with and without a boundary; `close` says whether two
    tensors are the same but for rounding."""
    vocabulary = policy.causal.config.get_text_config().vocab_size
    both, second, other = (_probe_batch(rows, vocabulary).to(policy.device) for rows in ([0, 1], [1], [2]))
    trial = Boundary(policy.model, np.full(3, PROBE_LENGTH))
    if not trial.below:
        return Probed("the first layer trains")
    was_training = policy.model.training
    policy.model.train()
    try:
        with torch.random.fork_rng():
            own = [_seeded(policy.outcome, batch) for batch in (both, second)]
            policy.boundary = trial
            states = [_seeded(partial(_states, policy, trial), both, seed) for seed in (1, 2)]
            if trial.trained_below:
                return Probed("something before the first trained layer trains")
            if not states[0].equal(states[1]):
                return Probed("there is dropout or noise in the frozen layers")
            policy.run_frozen(other)  # so that whatever layers remember of the last stream is of another
            trial.reading = True
            mine = [_seeded(policy.outcome, batch) for batch in (both, second)]
    except _WRONG:
        mine = []
    finally:
        policy.boundary = None
        policy.model.train(was_training)
    if not mine or not all(close(a, b) for a, b in zip(mine, own, strict=True)):
        return Probed("the layers above need more from those below than their hidden states")
    return Probed(None, states[0].shape[1], states[0].dtype)


def _states(policy: Any, trial: Boundary, batch: Batch) -> Tensor:
    policy.run_frozen(batch)
    trial._settle()
    assert trial.states_TH is not None
    return trial.states_TH[: batch.n_tokens].clone()


def _seeded(function: Callable[[Batch], Tensor], batch: Batch, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return function(batch).detach()


def _probe_batch(rows: list[int], vocabulary: int) -> Batch:
    ids = (np.arange(3 * PROBE_LENGTH) * 7919 + 3) % vocabulary
    sequences = [
        Tokens(ids[row * PROBE_LENGTH : (row + 1) * PROBE_LENGTH], np.ones(PROBE_LENGTH, np.float32)) for row in rows
    ]
    return collate(sequences, rows)
