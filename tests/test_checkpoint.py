"""Oracle: the folder as a crash at any moment would leave it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tunery import checkpoint
from tunery.checkpoint import CheckpointError, check_room, list_checkpoints, load_optimizer, load_state, save


def an_optimizer(size: int = 3) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.ones(size))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.arange(float(size))
    optimizer.step()
    return optimizer


def write(folder: Path) -> None:
    (folder / "weights").write_text("w")


def test_what_is_saved_comes_back(tmp_path):
    optimizer = an_optimizer()
    folder = save(tmp_path, 7, write, optimizer, {"step": 7, "best": None}, keep=2, best=None)
    assert folder.name == "checkpoint-7" and load_state(folder) == {"step": 7, "best": None}
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=True)
    load_optimizer(folder, fresh)
    for name, value in optimizer.state_dict()["state"][0].items():
        assert value.equal(fresh.state_dict()["state"][0][name])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_optimizer(
            folder, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))])
        )


def test_the_oldest_go_the_best_stays(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, write, an_optimizer(), {"step": step}, keep=2, best=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 4]
    save(tmp_path, 5, write, an_optimizer(), {"step": 5}, keep=None, best=None)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 4, 5]


def test_a_write_that_fails_leaves_the_earlier_one_and_no_rest(tmp_path):
    save(tmp_path, 1, write, an_optimizer(), {"step": 1}, keep=1, best=None)

    def fails(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left.*checkpoint-1 is whole; resume from it"):
        save(tmp_path, 2, fails, an_optimizer(), {"step": 2}, keep=1, best=None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_half_written_folders_are_not_checkpoints(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".checkpoint-8.writing").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_state(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / checkpoint.STATE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path / "checkpoint-9")


def test_room_is_checked_beforehand(tmp_path):
    check_room(tmp_path / "new" / "run", 1000)
    assert (tmp_path / "new" / "run").is_dir() and not list((tmp_path / "new" / "run").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        check_room(tmp_path / "file", 0)
    with pytest.raises(CheckpointError, match=r"MB free and the run will write about"):
        check_room(tmp_path, 10**18)
