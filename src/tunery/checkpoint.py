"""Checkpoints: written whole or not at all, and enough to go on bit for bit.

A checkpoint is a folder `checkpoint-N` that anyone can load (adapter or model files), with `optimizer.pt` and
`tunery_state.json` beside them. It is written under another name, flushed to the disk and renamed, so that a killed
process or a full disk leaves the previous one as it was. The learning rate, the order of the data and all randomness
are functions of the step, so the step is all there is to remember of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunery.errors import TuneryError
from tunery.files import make_readable
from tunery.schedule import interval

STATE = "tunery_state.json"
_GO_BACK = "remove this checkpoint to go on from the one before"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(TuneryError):
    """A checkpoint cannot be written or read."""


def save_interval(every: int | float | None, steps_per_epoch: int | None, total: int) -> int:
    """Steps between two checkpoints (train.save_every); by default an epoch, at most 500."""
    return interval(every, total, default=min(steps_per_epoch or 500, 500))


def list_checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, oldest first."""
    found = []
    for folder in output.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / STATE).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def save(
    output: Path,
    step: int,
    write_model: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int | None,
    best: int | None,
) -> Path:
    """Write `checkpoint-<step>` and remove the oldest beyond `keep` (None: none), never the one of step `best`. Raises
    CheckpointError when the disk is full or the folder is not writable; earlier checkpoints are untouched then."""
    final = output / f"checkpoint-{step}"
    temporary = output / f".checkpoint-{step}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_model(temporary)
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        make_readable(temporary)
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        flush_folder(output)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        last = [folder.name for _, folder in list_checkpoints(output)][-1:]
        kept = f"{last[0]} is whole; resume from it" if last else "there is no earlier one"
        raise CheckpointError(f"{final} could not be written: {error} ({kept})") from error
    for old_step, folder in list_checkpoints(output)[:-keep] if keep is not None else []:
        if old_step != best and old_step != step:
            shutil.rmtree(folder)
    return final


def flush(folder: Path) -> None:
    """fsync every file below a folder, and the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(folder)


def flush_folder(folder: Path) -> None:
    """fsync a folder's own entries (a rename within it)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(folder: Path) -> dict[str, Any]:
    """The state saved in a checkpoint. Raises CheckpointError naming what is wrong with it."""
    try:
        state = json.loads((folder / STATE).read_text())
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it does not say which step it is of")
        return state
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a checkpoint of Tunery (it has no {STATE})") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read: {error}; {_GO_BACK}") from error


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved moments back. Raises CheckpointError when they do not fit the parameters."""
    try:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    except (OSError, ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{folder / 'optimizer.pt'}: cannot be loaded: {what}; {_GO_BACK}") from error


def check_room(output: Path, bytes_needed: int) -> None:
    """Before training: the folder can be made and written, and the disk holds what the run will write. Raises
    CheckpointError otherwise."""
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"output: {output} is a file; a run needs a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"output: {output} cannot be written: {error}") from error
    free = shutil.disk_usage(output).free
    if free < bytes_needed:
        raise CheckpointError(
            f"output: {output} has {free / 1e6:,.0f} MB free and the run will write about "
            f"{bytes_needed / 1e6:,.0f} MB; free some, or lower train.keep"
        )
