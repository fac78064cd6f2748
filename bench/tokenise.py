"""How fast a file of rows becomes packed streams: read, parse, tokenise, store, and cut into streams.

    python -m bench.tokenise [--data FILE] [--tokenizer FOLDER] [--runs 3] [--workers N]

Needs the assets folder (TUNERY_ASSETS or ../shared/assets) unless both paths are given. Prints wall seconds and CPU
seconds of each run (the parent's and the tokenising processes'), without the cache; CPU seconds are what to compare on
a machine that is busy with other things."""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

from tunery.config import build, validate
from tunery.data.dataset import DataConfig, prepare
from tunery.data.loader import Cut, Loader
from tunery.data.store import TokenStore
from tunery.data.template import load_template
from tunery.job import Job
from tunery.models.load import ModelConfig, load_tokenizer


def cpu(who: int) -> float:
    """User and system seconds so far."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure(data: DataConfig, tokenizer: str) -> str:
    """One run, the template made afresh."""
    objective = build("objectives", Job().objective)
    template = load_template("auto", load_tokenizer(ModelConfig(name=tokenizer)), max_length=data.max_length)
    started, own, others = time.perf_counter(), cpu(resource.RUSAGE_SELF), cpu(resource.RUSAGE_CHILDREN)
    prepared = prepare(data, template, objective, seed=0)
    stored = time.perf_counter() - started
    assert isinstance(prepared.train, TokenStore)
    loader = Loader(prepared.train, batch_size=len(prepared.train), seed=0, shuffle=True, how=Cut(16384))
    step = loader.step(0)
    wall = time.perf_counter() - started
    report = prepared.report
    return (
        f"{report.rows:,} rows, {report.train.tokens:,} tokens: {stored:.2f} s to the store, {wall:.2f} s to "
        f"{len(step.micro):,} streams; {report.rows / wall:,.0f} rows/s; CPU "
        f"{cpu(resource.RUSAGE_SELF) - own:.2f} s here, {cpu(resource.RUSAGE_CHILDREN) - others:.2f} s in processes; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    assets = Path(os.environ.get("TUNERY_ASSETS") or Path(__file__).resolve().parents[2] / "shared" / "assets")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(assets / "datasets/alpaca/alpaca_data.json"))
    parser.add_argument("--tokenizer", default=str(assets / "tokenizers/qwen2.5"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None)
    given = parser.parse_args()
    data = validate(DataConfig, {"train": given.data, "cache": False, "workers": given.workers})
    for _ in range(given.runs):
        print(measure(data, given.tokenizer), flush=True)


if __name__ == "__main__":
    main()
