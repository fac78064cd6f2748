"""One contestant of bench.gpu in a process of its own: `python -m bench.gpu_contestants SPEC`, SPEC a JSON `Spec`.

Prints a line `RESULT {...}` for each kind of rows as soon as it is measured. The jobs are in gpu_job.py; models get
their random weights on the device they train on."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu_job import ALPHA, LR, RANK, SEED, SHAPES, Rows, Spec, make_config, make_rows, too_large, useful_flops

PREFIX = "RESULT "

# ---------------------------------------------------------------- the clock


class Enough(Exception):
    """The stopwatch has seen enough steps."""


class Stopwatch:
    """Times whole steps after `warmup` of them: at least two, and for at least `seconds` unless `deadline` comes."""

    def __init__(self, device: Any, lengths: np.ndarray, batch_size: int, warmup: int, seconds: float, deadline: float):
        self.device, self.warmup, self.wanted, self.deadline = device, warmup, seconds, deadline
        self.lengths, self.batch_size = lengths, batch_size
        self.done = self.began = 0
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []

    def step(self) -> bool:
        """After each optimizer step; True when it is enough."""
        self.done += 1
        if self.done == self.warmup:
            self._synchronize()
            self._forget_peak()
            self.began = time.perf_counter()
        if self.done <= self.warmup:
            return False
        first = (self.done - 1) * self.batch_size
        rows = np.arange(first, first + self.batch_size) % len(self.lengths)
        self.tokens += int(self.lengths[rows].sum())
        self.steps += 1
        if self.steps < 2 or (time.perf_counter() - self.began < self.wanted and time.time() < self.deadline):
            return False
        self._synchronize()
        self.seconds = time.perf_counter() - self.began
        return True

    @property
    def speed(self) -> float:
        """Real tokens a second."""
        return self.tokens / self.seconds

    def _synchronize(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        """The peak to report is that of a step, not of a search for what fits."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


# ---------------------------------------------------------------- Tunery


class Watched:
    """Stands in for a run's report: the loop tells it each step."""

    def __init__(self, watch: Stopwatch):
        from tunery.report import NullReport

        self.watch, self._silent = watch, NullReport()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._silent, name)

    def step(self, step: int, *, loss: float, **numbers: Any) -> None:
        self.watch.losses.append(loss)
        if self.watch.step():
            raise Enough


def run_tunery(spec: Spec, rows: Rows) -> dict[str, Any]:
    """The job through the doors of any run (resolve, set_up, the loop), on rows that are tokens already and with a
    model made on the device. The run chooses its streams and its checkpointing by its own plan."""
    from tunery.errors import TuneryError

    try:
        return _or_none(lambda: _tunery_once(spec, rows)) or {"error": "out of memory"}
    except TuneryError as error:
        return {"error": str(error).splitlines()[0]}


def _tunery_once(spec: Spec, rows: Rows) -> dict[str, Any]:
    import torch

    from tunery.config import build
    from tunery.data.dataset import Prepared
    from tunery.data.report import DataReport
    from tunery.engine import Engine
    from tunery.job import load_job
    from tunery.loop import train
    from tunery.read import Read
    from tunery.resolve import resolve
    from tunery.setup import set_up

    on_gpu = torch.cuda.is_available()
    dtype = "bfloat16" if on_gpu else "float32"
    with tempfile.TemporaryDirectory() as folder:
        make_config(spec.shape, getattr(torch, dtype)).save_pretrained(f"{folder}/model")
        adapter = {"kind": "lora", "rank": RANK, "alpha": ALPHA} if spec.method == "lora" else {"kind": "full"}
        job = load_job(
            {
                "model": {"name": f"{folder}/model", "random_init": True, "dtype": dtype},
                "data": {"max_length": max(8, int(rows.lengths.max()))},
                "adapter": adapter,
                "optimizer": {"lr": LR},
                "schedule": "constant",
                "train": {
                    "batch_size": rows.batch_size, "shuffle": False, "max_steps": 1_000_000, "save_every": 1_000_000,
                    "seed": SEED,
                },
                "output": f"{folder}/run",
            },
            spec.overrides,
        )  # fmt: skip
        engine = Engine(job.model.dtype)
        store = _store(rows, SHAPES[spec.shape]["vocab_size"])
        data = Prepared(store, None, [], DataReport())
        read = Read(tokenizer=None, template=None, objective=build("objectives", job.objective), data=data)  # type: ignore
        run = set_up(resolve(job, engine, read), engine, read, None)
        watch = Stopwatch(engine.device, rows.lengths, rows.batch_size, spec.warmup, spec.seconds, spec.deadline)
        with contextlib.suppress(Enough):
            train(run, Watched(watch))  # type: ignore[arg-type]
        setting = run.job.train
        said = f"streams of {setting.micro_tokens:,} tokens, checkpointing {setting.checkpointing}"
        return _measured(watch, engine.device, said, setting.checkpointing in ("full", "offload"), run.policy.notes)


def _store(rows: Rows, vocabulary: int) -> Any:
    from tunery.data.store import Chunk, pack_store
    from tunery.types import Tokens

    examples = [
        [Tokens(ids, (np.arange(len(ids)) >= prompt).astype(np.float32))]
        for ids, prompt in zip(rows.ids(vocabulary), rows.prompts.tolist(), strict=True)
    ]
    return pack_store([Chunk(examples, [(0, 0, n + 1) for n in range(len(examples))])], ["random rows"])


# ---------------------------------------------------------------- transformers.Trainer


def run_trainer(spec: Spec, rows: Rows, size: int | None) -> dict[str, Any]:
    """transformers.Trainer, with PEFT for LoRA: padded batches of `size` rows, sdpa. Where no size is given, that which
    is fastest on a few steps, from a whole step's rows downwards, halved; those that run out of memory do not count."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tunery.engine import Engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As Tunery has it: frozen weights in bfloat16, what trains in float32, arithmetic in bfloat16.
    dtype = torch.bfloat16 if device.type == "cuda" and spec.method == "lora" else torch.float32
    Engine("float32").seed(SEED, 0)  # as Tunery does, so that both begin with the same weights
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            make_config(spec.shape, dtype), dtype=dtype, attn_implementation="sdpa"
        )
    if spec.method == "lora":
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    dataset = _labelled_rows(rows, SHAPES[spec.shape]["vocab_size"])
    size = size or _fastest(spec, model, dataset, rows)
    if size is None:
        return {"error": "out of memory, with batches of one row too"}
    return {**_trainer_once(spec, model, dataset, rows, size, spec.warmup, spec.seconds), "size": size}


def _fastest(spec: Spec, model: Any, dataset: list[dict[str, Any]], rows: Rows) -> int | None:
    """The rows a forward that are fastest, None where not even one fits. Trains with a rate of 0, so that what is
    measured afterwards begins with the first weights."""
    best: tuple[float, int] | None = None
    size = rows.batch_size
    while size:
        probe = _or_none(lambda size=size: _trainer_once(spec, model, dataset, rows, size, 1, spec.seconds / 4, lr=0.0))
        if probe is not None:
            if best is not None and probe["speed"] < best[0]:
                break
            best = probe["speed"], size
        size //= 2
    return best[1] if best else None


def _trainer_once(
    spec: Spec, model: Any, dataset: list[dict[str, Any]], rows: Rows, size: int, warmup: int, seconds: float,
    lr: float = LR,
) -> dict[str, Any]:  # fmt: skip
    """`size` rows a forward, accumulated to a step's."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    watch = Stopwatch(device, rows.lengths, rows.batch_size, warmup, seconds, spec.deadline)

    class Callback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = watch.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            watch.losses += [logs["loss"]] if "loss" in (logs or {}) else []

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=size, gradient_accumulation_steps=rows.batch_size // size,
            max_steps=1_000_000, learning_rate=lr, lr_scheduler_type="constant", bf16=on_gpu, use_cpu=not on_gpu,
            gradient_checkpointing=spec.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential", remove_unused_columns=False, logging_first_step=True,
            logging_steps=1_000_000, save_strategy="no", report_to=[], disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        trainer = Trainer(model, arguments, pad, train_dataset=dataset, callbacks=[Callback()])  # type: ignore
        try:
            trainer.train()
        finally:
            # A trainer and its optimizer refer to each other: free them before the next one, or a failed one's error.
            model.zero_grad(set_to_none=True)
            trainer.optimizer = trainer.lr_scheduler = None
    said = f"batches of {size}, checkpointing {'full' if spec.checkpointing else 'none'}"
    return _measured(watch, device, said, spec.checkpointing, [])


def _labelled_rows(rows: Rows, vocabulary: int) -> list[dict[str, Any]]:
    import torch

    result = []
    for ids, prompt in zip(rows.ids(vocabulary), rows.prompts.tolist(), strict=True):
        input_ids = torch.from_numpy(ids.astype(np.int64))
        result.append({"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(len(ids)) < prompt, -100)})
    return result


def pad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A padded batch, on the right, as DataCollatorForSeq2Seq makes it (which would need a tokenizer)."""
    from torch.nn.utils.rnn import pad_sequence

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([row.new_ones(row.shape) for row in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


# ---------------------------------------------------------------- both


def _measured(watch: Stopwatch, device: Any, setting: str, recomputes: bool, notes: list[str]) -> dict[str, Any]:
    import torch

    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "steps": watch.steps, "tokens": watch.tokens, "seconds": watch.seconds, "speed": watch.speed,
        "peak_bytes": peak, "first_loss": watch.losses[0] if watch.losses else None, "setting": setting,
        "recomputes": recomputes, "notes": notes,
    }  # fmt: skip


def _or_none(measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """None where the device's memory does not suffice."""
    import torch

    try:
        return measure()
    except torch.OutOfMemoryError:
        pass
    finally:  # outside the handler the error, and all the tensors in its frames, is gone
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def main(spec: Spec) -> None:
    import torch
    import transformers

    from tunery.flops import peak_flops

    transformers.logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    hopeless = too_large(spec.method, spec.shape, torch.cuda.get_device_properties(0).total_memory) if on_gpu else None
    for data in spec.data:
        rows = make_rows(data, tiny=spec.shape == "tiny")
        if hopeless:
            result: dict[str, Any] = {"error": hopeless}
        elif time.time() >= spec.deadline:
            continue
        else:
            ours = spec.kind == "tunery"
            result = run_tunery(spec, rows) if ours else run_trainer(spec, rows, spec.sizes.get(data))
        result |= {"contestant": spec.contestant, "data": data, "peak_flops": peak_flops(device, dtype)}
        result |= {f"flops_{name}": number for name, number in useful_flops(spec.shape, spec.method, rows).items()}
        print(PREFIX + json.dumps(result), flush=True)
        gc.collect()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    main(Spec(**json.loads(sys.argv[1])))
