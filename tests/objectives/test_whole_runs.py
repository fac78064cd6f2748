"""Every objective of rows, in whole runs: the same steps and evaluations however the steps are cut, shared and spread
over ranks (float64), and to the bit where a run is resumed (float32, with dropout)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from processes import runs_on_two_ranks
from tiny_runs import WORDS, losses, same, tiny_job
from tunery.job import Job
from tunery.loop import run_job

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("pairs", {"kind": "dpo", "loss": ["sigmoid", "bco_pair", "ipo"], "ld_alpha": 0.3, "sft_weight": 0.2}),
    "orpo": ("pairs", {"kind": "orpo"}),
    "simpo": ("pairs", {"kind": "simpo", "sft_weight": 0.1}),
    "cpo": ("pairs", {"kind": "cpo"}),
    "reward": ("pairs", {"kind": "reward", "center_rewards_coefficient": 0.01}),
    "kto": ("thumbs", {"kind": "kto", "sft_weight": 0.1}),
    "bco": ("thumbs", {"kind": "bco"}),
    "distill": ("pairs", {"kind": "distill", "divergence": "jsd", "sft_weight": 0.5}),
}
CUTS = {
    "small streams": {"micro_tokens": 60},
    "one by one": {"packing": False},
    "prompts for each": {"share_prompts": False},
}


def write(path: Path, rows: str, count: int, start: int = 0) -> str:
    """Pairs, some with a margin; or thumbs, a third of which are pairs."""
    made = []
    for i in range(start, start + count):
        words = [WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(2 + i * i % 9)]
        pair = {"chosen": " ".join(reversed(words)), "rejected": " ".join([*words, words[0]])}
        thumb = {"completion": pair["chosen"] if i % 2 else "no " * (1 + i % 4), "label": bool(i % 2)}
        answers = thumb if rows == "thumbs" and i % 3 else pair | ({"margin": i / 10} if i % 4 == 0 else {})
        made.append({"prompt": f"{i}: " + " ".join(words), **answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def job(folder: Path, name: str, output: str, **changes: Any) -> Job:
    rows, objective = OBJECTIVES[name]
    teacher = {"teacher": str(folder / "model")} if name == "distill" else {}
    data = {
        "train": write(folder / f"{rows}.jsonl", rows, 20),
        "eval": write(folder / f"held_{rows}.jsonl", rows, 6, 1000),
    }
    values = {
        "data": data, "objective": {**objective, **teacher}, "eval": {"every": 2, "best": False},
        "output": str(folder / output), **changes, "train": {"batch_size": 7, **changes.get("train", {})},
    }  # fmt: skip
    return tiny_job(folder, **values)


def measured(output: str | Path) -> list[float]:
    """Losses, those of evaluations too."""
    lines = [json.loads(line) for line in (Path(output) / "trainer_log.jsonl").read_text().splitlines()]
    return [*losses(output), *(line["eval_loss"] for line in lines if "eval_loss" in line)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_run_does_not_depend_on_the_cut(tmp_path, name):
    run_job(job(tmp_path, name, "whole"))
    whole = measured(tmp_path / "whole")
    assert len(whole) == 10 and len(set(whole[:6])) == 6
    for number, cut in enumerate(CUTS.values()):
        run_job(job(tmp_path, name, f"cut{number}", train=cut))
        assert measured(tmp_path / f"cut{number}") == pytest.approx(whole, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, name, at):
    changes = {
        "model": {"dtype": "float32"}, "adapter": {"kind": "lora", "rank": 4, "dropout": 0.2},
        "train": {"save_every": 1, "keep": None},
    }  # fmt: skip
    run_job(job(tmp_path, name, "whole", **changes))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in range(at + 1, 7):
        shutil.rmtree(cut / f"checkpoint-{step}")
    for file in ("all_results.json", "adapter_model.safetensors"):
        (cut / file).unlink()
    run_job(job(tmp_path, name, "cut", **changes))
    assert measured(cut) == measured(whole) and same(cut, whole)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    """The last step of each epoch is a single row, so that one of the ranks has none."""
    alone, both = (
        [job(tmp_path, name, f"{name}-{ranks}", train={"batch_size": 19}) for name in OBJECTIVES]
        for ranks in ("one", "two")
    )
    for made in alone:
        run_job(made)
    status, text = runs_on_two_ranks(tmp_path, *both)
    assert status == 0, text
    for name in OBJECTIVES:
        one, two = measured(tmp_path / f"{name}-one"), measured(tmp_path / f"{name}-two")
        assert two == pytest.approx(one, rel=1e-9) and len(losses(tmp_path / f"{name}-two")) == 4
