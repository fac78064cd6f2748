"""Does reinforcement learn? A job with rewards, run with several seeds, its curve drawn in characters and kept.

    python -m bench.learn [JOB.yaml] [--seeds 1 2 3] [--picture learn.png] [key=value ...]

By default examples/grpo.yaml: the embedded model, and a reward that only checks rules (examples/house_rules.py). It
says the mean reward of sampled answers in the first rollouts and the last (a quarter, ten at most), and of the
likeliest answers to held-out prompts before and after; beside them the likeness to the right answers, which nothing
trains on, so that a reward that was hacked would show."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.results_page import HERE, described, save_result, write_section

ROOT = HERE.parent
RISES = (0.3, 0.8)  # held-out reward: from under the first to over the second
BARS = " ▁▂▃▄▅▆▇█"


def run(job: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run: its curve of rewards, what was held out, and the time it took."""
    import tunery

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        tunery.train(job, f"train.seed={seed}", f"output={folder}/run", "train.log_every=1", *overrides)
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (Path(folder) / "run/steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval_loss" not in line]
    held_out = {line["step"]: line["metrics"] for line in lines if "eval_loss" in line}
    rewards = [line["metrics"]["reward"] for line in steps if "reward" in line["metrics"]]
    curve = [total / weight for total, weight in rewards]
    return {"seed": seed, "seconds": round(seconds, 1), "curve": curve, "held_out": held_out}


def drawn(curve: list[float], low: float = 0.0, high: float = 1.0) -> str:
    """A curve as a line of bars."""
    shares = [min(1.0, max(0.0, (value - low) / (high - low))) for value in curve]
    return "".join(BARS[round(share * (len(BARS) - 1))] for share in shares)


def summary(found: dict[str, Any]) -> str:
    """What a person wants to know of a run, in two lines."""
    curve, held_out = found["curve"], found["held_out"]
    first, last = held_out[min(held_out, key=int)], held_out[max(held_out, key=int)]
    others = [name for name in first if name.endswith("/mean") and abs(first[name] - first["reward"]) > 1e-9]
    beside = "".join(f"; {name.split('/')[1]} {first[name]:.2f} -> {last[name]:.2f}" for name in others)
    end = curve[-max(1, min(10, len(curve) // 4)) :]
    sampled = f"sampled {sum(curve[:2]) / 2:.2f} -> {sum(end) / len(end):.2f}"
    held = f"held-out {first['reward']:.2f} -> {last['reward']:.2f}"
    return f"seed {found['seed']}: {sampled}, {held}{beside}; {found['seconds']:.0f} s\n  |{drawn(curve)}|"


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """The curves of all runs as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for found in runs:
        (line,) = axes.plot(range(1, len(found["curve"]) + 1), found["curve"], label=f"seed {found['seed']}")
        points = [(int(step), metrics["reward"]) for step, metrics in found["held_out"].items()]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color())
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward (line: sampled, dots: held-out)")
    axes.legend(frameon=False)
    figure.savefig(str(path), dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", nargs="?", type=Path, default=ROOT / "examples/grpo.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--picture", type=Path)
    args, overrides = parser.parse_known_args()
    runs = []
    for seed in args.seeds:
        runs.append(json.loads(json.dumps(run(args.job, seed, overrides))))
        print(summary(runs[-1]), flush=True)
    ends = [(r["held_out"][min(r["held_out"], key=int)], r["held_out"][max(r["held_out"], key=int)]) for r in runs]
    rose = all(before["reward"] < RISES[0] and after["reward"] > RISES[1] for before, after in ends)
    verdict = f"{'rises' if rose else 'does NOT rise'} from under {RISES[0]:.0%} to over {RISES[1]:.0%} with every seed"
    print(verdict)
    name = f"learn_{args.job.stem}"
    result = json.loads(save_result(name, {"job": args.job.name, "runs": runs}).read_text())
    lines = "\n".join(summary(found) for found in runs)
    title = f"## Reinforcement: {args.job.name}\n\n{described(result)}\n\nThe held-out reward {verdict}.\n\n"
    write_section(name, f"{title}```\n{lines}\n```")
    if args.picture is not None:
        picture(runs, args.picture)


if __name__ == "__main__":
    main()
