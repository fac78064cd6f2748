"""Oracle: the run that nothing happened to. Real processes: killed, interrupted, short of disk, several ranks."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import job_file, start, train, train_on_two_ranks
from tiny_runs import losses, same
from tunery.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow


def wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    """Until the log holds this step."""
    deadline = time.time() + 90
    while time.time() < deadline and process.poll() is None:
        if log.is_file() and f'"current_steps": {step},' in log.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()[0]}")


LONG = {"train": {"epochs": 12, "save_every": 3, "log_every": 1, "batch_size": 8}, "eval": {"every": 1000}}


def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(tmp_path):
    path = job_file(tmp_path, **LONG)
    train(path, f"output={tmp_path / 'whole'}")
    chance, output = random.Random(3), tmp_path / "killed"
    for at in sorted(chance.sample(range(2, 34), 2)):
        process = start("-m", "tunery", "train", path, f"output={output}")
        wait_for_step(output / "trainer_log.jsonl", at, process)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(path, f"output={output}")
    assert losses(output) == losses(tmp_path / "whole") and len(losses(output)) == 36
    assert same(output, tmp_path / "whole")


def test_ctrl_c_saves_says_so_and_exits_130(tmp_path):
    path, output = job_file(tmp_path, **LONG), tmp_path / "stopped"
    process = start("-m", "tunery", "train", path, f"output={output}", "train.save_every=1000")
    wait_for_step(output / "trainer_log.jsonl", 5, process)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted after step" in text and "Traceback" not in text
    step, _ = list_checkpoints(output)[-1]
    assert step >= 5
    train(path, f"output={output}", "train.save_every=1000")
    train(path, f"output={tmp_path / 'whole'}", "train.save_every=1000")
    assert losses(output) == losses(tmp_path / "whole")


def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    showing = {"generate": 5, "max_new_tokens": 6}
    path = job_file(tmp_path, train={"epochs": 2, "batch_size": 7, "micro_tokens": 60}, eval=showing)
    train(path, f"output={tmp_path / 'one'}")
    status, text = train_on_two_ranks(path, f"output={tmp_path / 'two'}")
    assert status == 0, text
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-11)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-8, atol=1e-10)
    answers = [(tmp_path / n / "generated_predictions.jsonl").read_text() for n in ("one", "two")]
    assert answers[0] == answers[1] and answers[0].count("\n") == 5
    evaluations = [json.loads((tmp_path / n / "eval_results.json").read_text())["eval_loss"] for n in ("one", "two")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-11)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    """A limit on the size of files stands in for the disk: the optimizer's file is the first to be too large."""
    path, output = job_file(tmp_path, **LONG), tmp_path / "full"
    process = start("-m", "tunery", "train", path, f"output={output}", "train.save_every=3")
    wait_for_step(output / "trainer_log.jsonl", 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = list_checkpoints(output)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from tunery.cli import main; sys.argv = ['tunery', *sys.argv[1:]]; main()"
    )
    process = start("-c", code, "train", path, f"output={output}", "train.save_every=3")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1, text
    assert "could not be written" in text and "resume from it" in text and "Traceback" not in text
    assert list_checkpoints(output) == kept and not list(output.glob(".checkpoint*"))
    train(path, f"output={output}")
    assert len(losses(output)) == 36


def test_a_folder_that_cannot_be_written_is_found_before_anything_else(tmp_path):
    path = job_file(tmp_path)
    (tmp_path / "file").write_text("")
    process = start("-m", "tunery", "train", path, f"output={tmp_path / 'file' / 'run'}")
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot be written" in text and "Traceback" not in text
