"""How true a plan is: its arithmetic against torch's FlopCounterMode, its memory and its time against real training.

    python -m bench.plan [--steps 8]

- flops: six shapes of model with LoRA, full and freeze-tuning. `counted` is what FlopCounterMode sees of one forward
  and backward of the real path (the head on labelled rows alone, attention sequence by sequence and written out in
  blocks, of which it counts the masked part as well), `planned` what the plan counts on shapes, and `useful` the closed
  form of flops.py, that MFU is made of.
- memory and time: five jobs on a random Qwen2 of 46.5M parameters, each in a process of its own. `allocated` is the
  highest sum of what torch's profiler saw the CPU allocator hand out and take back, `process` the process's highest
  resident memory in a second run without the profiler. The plan is made beforehand. Time: the plan after `--probe`
  (three steps) against the steps of a run that follows it.

Writes bench/results/plan_bf16.json or plan_fp32.json, by what this machine trains in, and its section of
bench/RESULTS.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from bench.results_page import HERE, described, save_result, write_section

WORDS = ("patient", "tablets", "were", "given", "after", "each", "meal", "for", "three", "weeks", "and", "felt", "well")


PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}  # what a CPU trains in, which depends on its instructions

# ------------------------------------------------------------ arithmetic

FLOP_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "Qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 32}),
    "Gemma 2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64}),
    "GPT-2": ("GPT2Config", {"bos_token_id": 1, "eos_token_id": 2}),
    "Qwen2-MoE": (
        "Qwen2MoeConfig",
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
         "shared_expert_intermediate_size": 128},
    ),
}  # fmt: skip
COMMON = {"vocab_size": 2048, "hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 12,
          "max_position_embeddings": 512}  # fmt: skip
LENGTHS, LABELLED = (96, 160, 128, 64), 224


def measure_flops(family: str, adapter: str) -> dict[str, Any]:
    """FLOPs of one micro-batch: counted, planned, useful."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    from tunery.config import build
    from tunery.flops import cost_of, flops_per_token
    from tunery.job import load_job
    from tunery.kernels import compiled
    from tunery.memory import MORE_FLOPS
    from tunery.models.fuse import fuse
    from tunery.models.load import hook_attention, load_model
    from tunery.plan.shadow import Shadow, Stream, trace
    from tunery.policy import CausalPolicy
    from tunery.types import Batch

    name, options = FLOP_SHAPES[family]
    wide = {} if family == "GPT-2" else {"intermediate_size": 640}
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, name)(**{**COMMON, **wide, **options}).save_pretrained(folder)
        job = load_job({"model": {"name": folder, "random_init": True, "dtype": "float32"}, "adapter": adapter})
        model = load_model(job.model, torch.float32)
        hook_attention(model)
        model = build("adapters", job.adapter).apply(model)
        fuse(model, job.kernels, torch.float32)
        policy, objective = CausalPolicy(model, dtype=torch.float32), build("objectives", job.objective)
        tokens = sum(LENGTHS)
        ids = torch.randint(3, 2000, (tokens,))
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        batch = Batch(
            ids_T=ids, targets_T=ids, weights_T=torch.ones(tokens),
            positions_T=torch.cat([torch.arange(n) for n in LENGTHS]), cu_seqlens=bounds, max_seqlen=max(LENGTHS),
            labelled_N=torch.arange(LABELLED), labelled_S=torch.tensor([LABELLED] + [0] * (len(LENGTHS) - 1)),
            lengths=list(LENGTHS),
        )  # fmt: skip
        # torch counts its own operations alone, so attention is not the C++ one
        with mock.patch.object(compiled, "takes_attention", return_value=False):
            with FlopCounterMode(display=False, custom_mapping=MORE_FLOPS) as counter:
                objective.loss(policy, batch).sum.backward()
            shapes = Shadow(job, torch.float32)
            work = trace(shapes, objective, Stream(LENGTHS, LABELLED)).work()
        mean = sum(n * n for n in LENGTHS) / tokens
        useful = tokens * flops_per_token(cost_of(shapes.model), labelled=LABELLED / tokens, mean_length=mean)
    planned = sum(flops * often for (_, flops, _), often in work.items())
    return {"family": family, "adapter": adapter, "counted": counter.get_total_flops(), "planned": planned,
            "useful": useful}  # fmt: skip


# ------------------------------------------------------------ memory and time


@dataclass(frozen=True)
class Case:
    """One job. `tokens`: lengths of its rows between these, in words."""

    name: str
    adapter: str
    train: dict[str, Any] = field(default_factory=dict)
    words: tuple[int, int] = (40, 400)
    batch_size: int = 4


CASES = (
    Case("LoRA", "lora"),
    Case("full", "full"),
    Case("freeze, 2 layers", "freeze"),
    Case("LoRA, checkpointing full", "lora", {"checkpointing": "full"}),
    Case("LoRA, micro-batches of 4,096 tokens", "lora", {"micro_tokens": 4096}, batch_size=16),
)


def make_model(folder: Path) -> None:
    """A random Qwen2 of 46.5M parameters with the embedded model's tokenizer, whose ids are the first of 32,000."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tunery.models.load import ModelConfig, load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=512, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1536, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_job(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The job as a mapping, with its rows on disk."""
    draw = random.Random(0)
    path = folder / f"rows-{case.words[0]}-{case.words[1]}-{case.batch_size}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(case.batch_size * steps):
            question, answer = (draw.choices(WORDS, k=draw.randint(*case.words) // 2) for _ in range(2))
            messages = [{"role": "user", "content": " ".join(question)},
                        {"role": "assistant", "content": " ".join(answer)}]  # fmt: skip
            file.write(json.dumps({"messages": messages}) + "\n")
    return {
        "model": str(folder / "model"),
        "data": {"train": str(path), "cache": False, "workers": 1, "max_length": 2048},
        "adapter": case.adapter,
        "train": {"batch_size": case.batch_size, "epochs": 1, "checkpointing": "none", **case.train},
        "output": str(folder / "run"),
    }


def child(job: dict[str, Any], what: str, steps: int) -> dict[str, Any]:
    """In a process of its own, one measurement: `allocated`, `process`, or `time` (with the plan)."""
    from tunery import probe
    from tunery.job import load_job
    from tunery.read import read_data

    parsed = load_job(job)
    read = read_data(parsed)
    cut = parsed.train.micro_tokens or 2048, parsed.train.checkpointing
    if what == "allocated":
        return {"allocated": allocated(lambda: probe.probe(parsed, read, *cut, steps=steps))}
    if what == "process":
        return {"process": probe.probe(parsed, read, *cut, steps=steps).peak}
    return timed(parsed, read, steps)


def allocated(train: Callable[[], object]) -> int:
    """The highest sum of what the CPU allocator handed out and took back."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory: list[Any] = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in memory):
        live += change
        peak = max(peak, live)
    return peak


def timed(job: Any, read: Any, steps: int) -> dict[str, Any]:
    """The plan, then three steps to correct it by, then the steps it is held against."""
    from tunery import probe
    from tunery.devices import this_device
    from tunery.plan.bill import corrected, make_plan
    from tunery.plan.planner import Planner

    planner = Planner(job, read.data.train, this_device("cpu"))
    plan = make_plan(planner)
    cut = plan.micro_tokens, plan.checkpointing
    after_probe = corrected(plan, planner, probe.probe(job, read, *cut))
    real = probe.probe(job, read, *cut, steps=steps)
    expected = sum(planner.step_seconds(streams, plan.checkpointing) for streams in real.streams[1:])
    return {
        "planned": plan.memory.total - plan.memory.overhead, "planned_process": plan.memory.total,
        "unprobed_seconds": expected, "seconds": sum(real.seconds[1:]),
        "planned_seconds": expected * after_probe.seconds_per_step / plan.seconds_per_step,
        "memory": plan.to_dict()["memory"], "micro_tokens": plan.micro_tokens,
        "dtype": str(planner.dtype).removeprefix("torch."),
    }  # fmt: skip


def run_child(job: dict[str, Any], what: str, steps: int) -> dict[str, Any]:
    quiet = {
        "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONWARNINGS": "ignore",
        "HF_DEACTIVATE_ASYNC_LOAD": "1",  # the profiler sees what the main thread allocates
    }  # fmt: skip
    spec = json.dumps({"job": job, "what": what, "steps": steps})
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", "--child", spec], capture_output=True, text=True, cwd=HERE.parent,
        env=os.environ | quiet,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{job['adapter']}: the measured process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------ the page


def off(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.1%}"


def flop_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | adapter | counted | planned | | useful | |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        counted, planned, useful = (row[key] for key in ("counted", "planned", "useful"))
        lines.append(
            f"| {row['family']} | {row['adapter']} | {counted / 1e9:.2f} G | {planned / 1e9:.2f} G | "
            f"{off(planned, counted)} | {useful / 1e9:.2f} G | {off(useful, counted)} |"
        )
    return lines


def job_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| job | allocated | planned | | process | planned | |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        a, p, whole, planned = (row[k] / 1e6 for k in ("allocated", "planned", "process", "planned_process"))
        lines.append(
            f"| {row['case']['name']} | {a:.0f} MB | {p:.0f} MB | {off(p, a)} | {whole:.0f} MB | {planned:.0f} MB | "
            f"{off(planned, whole)} |"
        )
    lines += ["", "| job | seconds | after the probe | | before it | |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        real, planned, before = (row[key] for key in ("seconds", "planned_seconds", "unprobed_seconds"))
        lines.append(
            f"| {row['case']['name']} | {real:.2f} | {planned:.2f} | {off(planned, real)} | {before:.2f} | "
            f"{off(before, real)} |"
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    return "\n".join([
        f"## The plan against what happens, in {result['precision']}", "", described(result), "",
        f"Arithmetic of one micro-batch of {sum(LENGTHS)} tokens, {LABELLED} of them trained on, against torch's "
        "FlopCounterMode (taught the products in place and in groups that it passes over). It sees matrix products, "
        "not fused attention; ours on a CPU is made of products in blocks of 64 queries, so the masked part of each "
        "counts. `useful` is the closed form that MFU is made of: it takes a causal half of attention, and gives the "
        "first layer's input a gradient that is not made.", "",
        *flop_table(result["flops"]), "",
        "Memory at the worst moment: `allocated` by torch's CPU allocator (its profiler's count), and resident in the "
        "whole `process`. Random Qwen2 of 46.5M parameters, stored in bfloat16, rows of 40 to 400 words, batch 4 (16 "
        "in the last), loaded by one thread, which is the one that the profiler sees.", "",
        *job_tables(result["jobs"]), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="real steps of each job")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(**json.loads(arguments.child))))
        return
    flops = [measure_flops(family, adapter) for family in FLOP_SHAPES for adapter in ("lora", "full", "freeze")]
    print("\n".join(flop_table(flops)))
    jobs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        for case in CASES:
            job = make_job(case, folder, arguments.steps)
            jobs.append({"case": asdict(case)})
            for what in ("allocated", "process", "time"):
                jobs[-1] |= run_child(job, what, arguments.steps)
            print("\n".join(job_tables(jobs[-1:])))
    precision = PRECISIONS[jobs[0]["dtype"]]
    path = save_result(f"plan_{precision}", {"precision": precision, "flops": flops, "jobs": jobs})
    write_section(f"plan_{precision}", markdown(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
