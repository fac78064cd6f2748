"""What the reinforcement comparison asks of everybody, not timings. Oracle: worked by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from bench.contestants import Contestant
from bench.grpo import GROUP, LONGEST, Prompts, contestants, summarise, table
from bench.jobs import JOBS


def test_samples_are_prompts_times_answers():
    run = {
        "steps": [{"loss": 0.0, "seconds": s, "tokens": 32} for s in (9.0, 9.0, 2.0)],
        "peak_bytes": 2**30,
        "settings": {},
        "load": 0.5,
    }
    job = SimpleNamespace(batch_size=4)
    prompts = Prompts(job, Path("nowhere"), [100] * 12, [], 0.0)  # type: ignore[arg-type]
    result = summarise(prompts, [Contestant("tunery-bf16", "tunery", "plain", "bf16")], {"tunery-bf16": [run]})
    assert result["contestants"][0]["per_second"] == 4 * GROUP / 2
    assert result["contestants"][0]["tokens_per_second"] == 4 * GROUP / 2 * LONGEST
    assert "4 prompts a step of 100 tokens on average" in table(result) and "1 timed steps" in table(result)


def test_the_contestants_have_names_of_their_own_and_the_same_job():
    for precision in ("bf16", "fp32"):
        names = [one.name for one in contestants(precision)]
        assert names[0] == f"tunery-{precision}" and len(set(names)) == len(names) > 1
        assert {one.precision for one in contestants(precision)} == {precision}
    spec = Prompts(JOBS["A"], Path("nowhere"), [], [], 0.0).spec()
    assert spec["sections"]["rollout"] == {"group": spec["job"]["group"], "max_new_tokens": spec["job"]["longest"]}
    assert spec["sections"]["rewards"][0]["target"] == spec["job"]["wanted"]
