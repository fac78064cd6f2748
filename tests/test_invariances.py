"""Whole runs of every objective that trains on the rows of the data. Oracle: the same run with each sequence whole, in
one stream a step, on one rank, and never stopped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from processes import start
from tiny_runs import WORDS, final_weights, losses, model_folder, same, tiny_job
from tunery.job import Job
from tunery.loop import run_job
from tunery.run_folder import write_config

pytestmark = pytest.mark.slow

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"loss": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "sft_weight": 0.5},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "reward": {"center_rewards_coefficient": 0.01},
    "kto": {"undesirable_weight": 1.5},
    "bco": {},
    "distill": {"divergence": "jsd"},
}
THUMBS = ("kto", "bco")
CUTS: dict[str, dict[str, Any]] = {
    "micro-batches": {"micro_tokens": 70},
    "one by one": {"packing": False},
    "shared prompts": {"share_prompts": True, "micro_tokens": None},
}


def write_answers(path: Path, kind: str) -> Path:
    """Two answers to each prompt: as pairs, as two rows with thumbs, or the better one alone."""
    rows: list[dict[str, Any]] = []
    for i in range(24):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i % 6)]
        prompt, good, bad = f"{i}: {' '.join(words)}", " ".join(reversed(words)), " ".join([*words, words[0]])
        if kind in THUMBS:
            rows += [{"prompt": prompt, "completion": good, "label": True}]
            rows += [{"prompt": prompt, "completion": bad, "label": False}]
        elif kind in ("sft", "distill"):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]
            rows.append({"messages": [*turns, {"role": "user", "content": "again"}, turns[1]]})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def job_of(folder: Path, kind: str, name: str, **train: Any) -> Job:
    rows, options = folder / f"{kind}.jsonl", dict(OBJECTIVES[kind])
    if not rows.is_file():
        write_answers(rows, kind)
    if kind == "distill":
        if not (folder / "teacher").is_dir():
            model_folder(folder / "teacher")
            weights = folder / "teacher" / "model.safetensors"
            from safetensors.torch import load_file, save_file

            save_file({k: 1.3 * v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        options["teacher"] = str(folder / "teacher")
    data = {"train": str(rows), "eval": 0.25}
    plain = {"epochs": 2, "batch_size": 9, "share_prompts": False, "micro_tokens": 4096, "save_every": 2, "keep": 9}
    return tiny_job(
        folder, objective={"kind": kind, **options}, data=data, train={**plain, **train}, output=str(folder / name)
    )


def evaluation(output: str | Path) -> float:
    return json.loads((Path(output) / "eval_results.json").read_text())["eval_loss"]


def assert_the_same(a: str | Path, b: str | Path) -> None:
    assert len(losses(a)) >= 4 and losses(a) == pytest.approx(losses(b), rel=1e-9)
    assert evaluation(a) == pytest.approx(evaluation(b), rel=1e-9)
    mine, expected = final_weights(Path(a)), final_weights(Path(b))
    assert mine.keys() == expected.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], expected[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_is_the_same_however_it_is_cut_and_stopped(tmp_path, kind):
    whole = job_of(tmp_path, kind, "whole")
    run_job(whole)
    for name, train in CUTS.items():
        other = job_of(tmp_path, kind, name, **train)
        run_job(other)
        assert_the_same(other.output, whole.output)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole.output, resumed)
    for path in [
        *sorted(resumed.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[1:],
        resumed / "all_results.json",
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_job(whole.model_copy(update={"output": str(resumed)}))
    assert losses(resumed) == losses(whole.output) and same(resumed, Path(whole.output))


def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    """One start of two processes for all objectives: most of its time goes into starting."""
    files = []
    for kind in OBJECTIVES:
        run_job(job_of(tmp_path, kind, f"{kind}-one"))
        folder = tmp_path / f"{kind}-job"
        folder.mkdir()
        write_config(job_of(tmp_path, kind, f"{kind}-two"), folder)
        files.append(folder / "tunery.yaml")
    port = 29_400 + os.getpid() % 500
    script = Path(__file__).with_name("rank_runs.py")
    process = start("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, script, *files)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    for kind in OBJECTIVES:
        assert_the_same(tmp_path / f"{kind}-two", tmp_path / f"{kind}-one")
