"""The same reinforcement (GRPO with LoRA) in Tunery and in TRL: samples per second, peak memory, loss.

    python -m bench.grpo [--precision bf16|fp32] [--rounds 3] [--steps 6] [--rivals trl-bf16 ...] [--python PYTHON]
                         [--assets FOLDER]

Prompts of LLaMA-Factory's alpaca_en_demo, a group of answers to each from the model as it stands, a reward that costs
nothing (the answer's length), one update; the model of bench.sft's job A. It is random, so hardly an answer ends by
itself, and all contestants generate and train on answers of the same length. Each trains in a process of its own, in
turns. docs/benchmarks.md says what is measured. Writes bench/results/grpo_PRECISION.json and a section of
bench/RESULTS.md; a trial (--tiny) is printed only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import per_second
from bench.contestants import PLAIN, Contestant, tunery
from bench.jobs import JOBS, ROWS, Job, Prepared, data_section, save_model, tiny

LR, GROUP, PROMPTS, LONGEST, PROMPT_TOKENS = 1e-5, 8, 4, 64, 256
WANTED = 200  # characters: what the reward likes best
SOURCE = "datasets/llamafactory/alpaca_en_demo.json"


class Prompts(Prepared):
    """`lengths`: tokens of each prompt."""

    def spec(self) -> dict[str, Any]:
        spec = super().spec()
        spec["job"] |= {"lr": LR, "group": GROUP, "longest": LONGEST, "wanted": WANTED}
        return spec | {"sections": {
            "objective": "grpo", "rewards": [{"kind": "length", "unit": "characters", "target": WANTED}],
            "rollout": {"group": GROUP, "max_new_tokens": LONGEST},
        }}  # fmt: skip


def contestants(precision: str) -> list[Contestant]:
    """Tunery, TRL as it comes and at its best on a CPU."""
    plain, dtype = {**PLAIN, "bf16": precision == "bf16"}, {"bf16": "bfloat16", "fp32": "float32"}[precision]

    def trl(name: str, about: str, arguments: dict[str, Any], dtype: str = dtype) -> Contestant:
        return Contestant(f"trl-{name}", "trl_grpo", about, precision, {"dtype": dtype, "arguments": arguments}, False)

    as_it_comes = [] if precision == "fp32" else [
        trl("default-cpu", "as it comes, with use_cpu: bf16 autocast, checkpointing on", {"use_cpu": True}, "float32")
    ]  # fmt: skip
    return [tunery(precision), *as_it_comes, trl(precision, f"{precision}, checkpointing off", plain)]


def prepare(job: Job, assets: Path, folder: Path) -> Prompts:
    """The model, and the first `job.rows` prompts of at most PROMPT_TOKENS tokens, as rows that both can read."""
    from tunery.data.store import TokenStore
    from tunery.job import load_job
    from tunery.read import read_data

    folder.mkdir(parents=True)
    save_model(job, assets, folder)
    rows = json.loads((assets / SOURCE).read_text(encoding="utf-8"))
    prompts = [
        {"prompt": [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}]}
        for row in rows
    ]
    path = folder / ROWS

    def read(chosen: Sequence[Any]) -> TokenStore:
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        values = {"model": str(folder / "model"), "data": data_section(str(path), PROMPT_TOKENS)}
        sections = {"objective": "grpo", "rewards": [{"kind": "length", "target": WANTED}]}
        store = read_data(load_job({**values, **sections})).data.train
        assert isinstance(store, TokenStore)
        return store

    store = read(prompts[: 2 * job.rows])
    store = read([prompts[store.origin(number)[1] - 1] for number in range(job.rows)])
    return Prompts(job, folder, [int(length) for length in store.lengths], [], 0.0)


def summarise(prepared: Prompts, field_: Sequence[Contestant], runs: dict[str, Any]) -> dict[str, Any]:
    """The job's facts and each contestant's figures."""
    facts = {
        "prompts": len(prepared.lengths), "a_step": prepared.job.batch_size, "group": GROUP, "longest": LONGEST,
        "mean_prompt": sum(prepared.lengths) / len(prepared.lengths),
    }  # fmt: skip
    lines = per_second.summarise(field_, runs, prepared.job.batch_size * GROUP, LONGEST)
    return {"job": facts, "rounds": len(runs[field_[0].name]), "contestants": lines}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    job = result["job"]
    timed = job["prompts"] // job["a_step"] - per_second.WARMUP
    said = (
        f"{job['a_step']} prompts a step of {job['mean_prompt']:.0f} tokens on average, {job['group']} answers of "
        f"up to {job['longest']} tokens to each; {timed} timed steps, {result['rounds']} "
        f"round{'s' * (result['rounds'] > 1)}. tokens/s are those generated."
    )
    return "\n".join([said, "", *per_second.table(result["contestants"], "samples")])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return per_second.options(__doc__ or "", 6, f"{PROMPTS} prompts", arguments)


def main() -> None:
    options = parse()
    job = tiny(JOBS["A"]) if options.tiny else JOBS["A"]
    rows = options.steps * PROMPTS
    job = Job(job.name, job.title, job.shape, rows=rows, batch_size=PROMPTS, max_length=PROMPT_TOKENS)
    per_second.hold(
        "grpo", "Reinforcement beside TRL", job, options, contestants(options.precision), prepare, summarise, table
    )


if __name__ == "__main__":
    main()
