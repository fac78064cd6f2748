"""The same preference training (DPO with LoRA) in Tunery and in TRL: pairs and tokens per second, peak memory, loss.

    python -m bench.dpo [--precision bf16|fp32] [--rounds 3] [--steps 8] [--rivals trl-bf16 ...] [--python PYTHON]
                        [--assets FOLDER]

The first pairs of LLaMA-Factory's dpo_en_demo that fit the cut-off; the model of bench.sft's job A. Each contestant
trains in a process of its own, in turns. docs/benchmarks.md says what is measured. Writes
bench/results/dpo_PRECISION.json and a section of bench/RESULTS.md; a trial (--tiny) is printed only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import per_second
from bench.contestants import PLAIN, Contestant, tunery
from bench.jobs import JOBS, Job, Prepared, data_section, tiny

BETA, LR = 0.1, 5e-5
ROWS = "datasets/llamafactory/dpo_en_demo.json"


@dataclass
class Pairs(Prepared):
    """`lengths`: tokens of each pair, both sequences; `shared`: with what both begin with counted once."""

    shared: list[int] = field(default_factory=list)

    def spec(self) -> dict[str, Any]:
        spec = super().spec()
        spec["job"] |= {"lr": LR, "beta": BETA}
        return spec | {"sections": {"objective": {"kind": "dpo", "beta": BETA}}}


def contestants(precision: str) -> list[Contestant]:
    """Tunery with and without sharing prompts, TRL as it comes and at its best on a CPU. (TRL 1.16's padding_free is
    switched off by TRL itself.)"""
    plain, dtype = {**PLAIN, "bf16": precision == "bf16"}, {"bf16": "bfloat16", "fp32": "float32"}[precision]
    ahead = {"precompute_ref_log_probs": True}

    def trl(name: str, about: str, arguments: dict[str, Any], dtype: str = dtype) -> Contestant:
        settings = {"dtype": dtype, "arguments": arguments}
        return Contestant(f"trl-{name}", "trl_dpo", about, precision, settings)

    as_it_comes = [] if precision == "fp32" else [
        trl("default-cpu", "as it comes, with use_cpu: bf16 autocast, checkpointing on", {"use_cpu": True}, "float32")
    ]  # fmt: skip
    return [
        tunery(precision),
        tunery(precision, f"tunery-{precision}-unshared", ["train.share_prompts=false"], "each prompt twice"),
        *as_it_comes,
        trl(precision, f"{precision}, checkpointing off", plain),
        trl(f"{precision}-ahead", "the same, the reference precomputed", {**plain, **ahead}),
    ]  # fmt: skip


def prepare(job: Job, assets: Path, folder: Path) -> Pairs:
    """The model, and the first `job.rows` pairs that Tunery uses: as rows, and as the tokens that it renders."""
    from bench.jobs import ROWS as ROWS_FILE
    from bench.jobs import TOKENS, save_model
    from tunery.data.store import TokenStore
    from tunery.job import load_job
    from tunery.read import read_data

    folder.mkdir(parents=True)
    save_model(job, assets, folder)
    rows = json.loads((assets / ROWS).read_text(encoding="utf-8"))
    path = folder / ROWS_FILE

    def read(chosen: Sequence[Any]) -> TokenStore:
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        values = {"model": str(folder / "model"), "data": data_section(str(path), job.max_length), "objective": "dpo"}
        store = read_data(load_job(values)).data.train
        assert isinstance(store, TokenStore)
        return store

    store = read(rows)
    usable = [rows[store.origin(number)[1] - 1] for number in range(min(job.rows, len(store)))]
    store = read(usable)
    pairs = [[tokens.ids.tolist() for tokens in store.sequences(number)] for number in range(len(store))]
    with (folder / TOKENS).open("w", encoding="utf-8") as file:
        for number, (chosen, rejected) in enumerate(pairs):
            start = min(int((tokens.weights > 0).argmax()) for tokens in store.sequences(number))
            row = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
            file.write(json.dumps(row) + "\n")
    return Pairs(
        job, folder, [int(n) for n in store.lengths], [], 0.0, shared=[int(n) for n in store.lengths_when_shared]
    )


def summarise(prepared: Pairs, field_: Sequence[Contestant], runs: dict[str, Any]) -> dict[str, Any]:
    """The job's facts and each contestant's figures."""
    facts = {
        "pairs": len(prepared.lengths), "batch_size": prepared.job.batch_size, "max_length": prepared.job.max_length,
        "tokens": sum(prepared.lengths), "tokens_when_shared": sum(prepared.shared),
    }  # fmt: skip
    mean = facts["tokens"] / facts["pairs"]
    lines = per_second.summarise(field_, runs, prepared.job.batch_size, mean)
    return {"job": facts, "rounds": len(runs[field_[0].name]), "contestants": lines}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    job = result["job"]
    saved = 1 - job["tokens_when_shared"] / job["tokens"]
    timed = job["pairs"] - per_second.WARMUP * job["batch_size"]
    said = (
        f"{job['pairs']} pairs of dpo_en_demo ({timed} of them timed), {job['tokens']:,} tokens in both sequences, "
        f"cut-off {job['max_length']:,}, {job['batch_size']} pairs a step; {result['rounds']} "
        f"round{'s' * (result['rounds'] > 1)}. A prompt run once for both answers saves {saved:.0%} of the tokens."
    )
    return "\n".join([said, "", *per_second.table(result["contestants"], "pairs")])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return per_second.options(__doc__ or "", 8, "4 pairs", arguments)


def main() -> None:
    options = parse()
    job = tiny(JOBS["A"]) if options.tiny else JOBS["A"]
    job = Job(job.name, job.title, job.shape, rows=options.steps * job.batch_size, batch_size=job.batch_size)
    per_second.hold(
        "dpo", "Preferences beside TRL", job, options, contestants(options.precision), prepare, summarise, table
    )


if __name__ == "__main__":
    main()
