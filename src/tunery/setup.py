"""Everything a run needs before its first step, built in the order in which it can be wrong: configuration, folder,
data, and only then the model."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from tunery import __version__, checkpoint
from tunery.config import build, read_config
from tunery.data.dataset import Prepared, prepare
from tunery.data.loader import Cut, Loader, StreamLoader
from tunery.data.store import TokenStore
from tunery.data.template import ChatTemplate, load_template
from tunery.diagnose import DataCounts
from tunery.engine import Engine
from tunery.errors import ConfigError, ModelError
from tunery.job import Job
from tunery.models.load import ModelConfig, hook_attention, load_config, load_model, load_tokenizer
from tunery.policy import CausalPolicy
from tunery.trackers import require
from tunery.types import Objective

CONFIG, REFUSED = "tunery.yaml", "data_refused.jsonl"
# What may change between a run and its resume without changing the result.
FREE = {"output", "report", "train.resume", "train.log_every", "train.save_every", "train.keep", "train.micro_tokens",
        "train.checkpointing", "train.packing", "data.workers", "data.cache", "eval.generate",
        "eval.max_new_tokens"}  # fmt: skip


@dataclass
class Run:
    """A run ready to start. `resume` is the checkpoint it goes on from, `start` the steps already done."""

    job: Job
    engine: Engine
    output: Path
    tokenizer: Any
    template: ChatTemplate
    data: Prepared
    objective: Objective
    adapter: Any
    model: Any
    policy: CausalPolicy
    optimizer: torch.optim.Optimizer
    peak_lrs: list[float]
    loader: Loader | StreamLoader
    cut: Cut
    total_steps: int
    base_dtype: torch.dtype
    resume: Path | None
    start: int
    state: dict[str, Any]
    versions: dict[str, str]

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save_weights(self, folder: Path) -> None:
        """The trained weights as anyone can load them, with the tokenizer and the template trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(self.model, folder, base_name(self.job.model))
        save_tokenizer(self, folder)


def base_name(model: ModelConfig) -> str:
    """What an adapter is an adapter of: the weights folder it started from, or the model's name."""
    start = model.init_from
    return start if start and not (Path(start) / "adapter_config.json").is_file() else model.name


def save_tokenizer(run: Run, folder: Path) -> None:
    """The tokenizer with the chat template trained with, so that whoever serves the model renders the same."""
    own = run.tokenizer.chat_template
    if run.template.source is not None:
        run.tokenizer.chat_template = run.template.source
    run.tokenizer.save_pretrained(str(folder))
    run.tokenizer.chat_template = own


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    found = {"tunery": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_config(job: Job, folder: Path) -> None:
    """tunery.yaml: the resolved configuration, which reproduces the run, with the versions as a comment."""
    head = "# " + ", ".join(f"{name} {number}" for name, number in versions().items())
    text = yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(f"{head}\n{text}", encoding="utf-8")


def resolve(job: Job, engine: Engine) -> Job:
    """The job with everything left to us decided, so that the saved configuration reproduces the run elsewhere."""
    optimizer, model = job.optimizer, job.model
    adapter = build("adapters", job.adapter)
    if getattr(optimizer, "lr", 0.0) is None:
        optimizer = optimizer.model_copy(update={"lr": adapter.default_lr})
    model = model.model_copy(update={"dtype": str(engine.dtype).removeprefix("torch.")})
    train = job.train
    if train.micro_tokens is None:
        tokens = 16384 if engine.device.type == "cuda" else 2048
        train = train.model_copy(update={"micro_tokens": max(tokens, job.data.max_length)})
    return job.model_copy(update={"optimizer": optimizer, "model": model, "train": train})


# ---------------------------------------------------------------- the run folder


def find_resume(job: Job, output: Path) -> Path | None:
    """The checkpoint to go on from: named, or the newest in the run folder."""
    if isinstance(job.train.resume, str):
        folder = Path(job.train.resume)
        checkpoint.load_state(folder)
        return folder
    found = checkpoint.list_checkpoints(output)
    return found[-1][1] if job.train.resume and found else None


def is_finished(job: Job, output: Path) -> bool:
    """Whether the run folder already holds this very run, finished."""
    if job.train.resume is not True or not (output / "all_results.json").is_file():
        return False
    return (output / CONFIG).is_file() and not changed_keys(job, output / CONFIG)


def changed_keys(job: Job, saved: Path) -> list[str]:
    """Keys that differ from the saved configuration in a way that would change the result."""
    then, now = _flat(read_config(saved)), _flat(job.model_dump(mode="json"))
    keys = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in FREE)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def open_folder(job: Job, output: Path, resume: Path | None, engine: Engine) -> None:
    """Make the run folder ready: refuse to mix two runs in it, and lose nothing that is there."""
    saved = output / CONFIG
    if resume is not None and saved.is_file() and resume.parent.resolve() == output.resolve():
        changed = changed_keys(job, saved)
        if changed:
            raise ConfigError(
                f"output: {output} holds a run with another configuration ({', '.join(changed[:8])} differ); "
                "give another output, or train.resume=false to start anew beside it"
            )
    if not engine.is_main:
        return
    if resume is None and saved.is_file():
        number = next(n for n in range(1, 10_000) if not output.with_name(f"{output.name}.old-{n}").exists())
        output.rename(output.with_name(f"{output.name}.old-{number}"))
    checkpoint.check_room(output, 0)


def interval(value: int | float | None, total: int, default: int) -> int:
    """Steps between two of something: given as steps, as a share of the run, or by default."""
    if value is None:
        return max(1, default)
    return max(1, math.ceil(value * total)) if value < 1 else int(value)


def save_interval(job: Job, loader: Loader | StreamLoader, total: int) -> int:
    """Steps between two checkpoints; by default an epoch, at most 500."""
    return interval(job.train.save_every, total, default=min(loader.steps_per_epoch or 500, 500))


def bytes_to_write(model: Any, adapter: Any, keep: int) -> int:
    """What the checkpoints of a run take at most: weights, and two float32 moments for what trains."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) if adapter.whole else trained
    return (keep + 3) * (weights + 2 * trained)


# ---------------------------------------------------------------- model, optimizer, loader


def load_start(job: Job, adapter: Any, resume: Path | None, engine: Engine) -> tuple[Any, torch.dtype]:
    """The model with its trainable parameters, from the base, from `model.init_from`, or from a checkpoint; and the
    dtype its base was stored in."""
    source, start = job.model, Path(job.model.init_from) if job.model.init_from else None
    stored = load_config(source).dtype
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    dtype = engine.dtype
    start_adapter = start is not None and (start / "adapter_config.json").is_file()
    if resume is not None and adapter.whole:
        # Checkpoints of whole models hold float32 for what trains; what is frozen goes back to `dtype` exactly.
        source, dtype = _from_folder(source, resume), torch.promote_types(dtype, torch.float32)
    elif start is not None and not start_adapter:
        source = _from_folder(source, start)
    engine.seed(job.train.seed, 0)
    model = load_model(source, dtype, engine.device, None if job.model.attention == "auto" else job.model.attention)
    if start_adapter and adapter.whole and resume is None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(start)).merge_and_unload()
    if job.model.attention == "auto":
        hook_attention(model)
    start_adapter_folder = start if start_adapter and not adapter.whole else None
    wrapped = adapter.apply(model, start_adapter_folder, resume if not adapter.whole else None)
    if adapter.whole and dtype != engine.dtype:
        for parameter in wrapped.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(engine.dtype)
    return wrapped, stored


def _from_folder(model: ModelConfig, folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds neither an adapter (adapter_config.json) nor a model (config.json)")
    return model.model_copy(update={"name": str(folder), "revision": None, "random_init": False})


def parameter_groups(model: Any, adapter: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay. Biases, norms and other vectors are not decayed."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (lr * adapter.lr_scale(name), weight_decay if parameter.ndim >= 2 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in sorted(groups.items(), key=_key)]


def _key(item: tuple[tuple[float, float], Any]) -> tuple[float, float]:
    return item[0]


def make_loader(job: Job, data: Prepared, cut: Cut) -> tuple[Loader | StreamLoader, int]:
    """The loader and the number of optimizer steps of the whole run."""
    train = job.train
    if isinstance(data.train, TokenStore):
        loader = Loader(data.train, batch_size=train.batch_size, seed=train.seed, shuffle=train.shuffle, how=cut)
        return loader, train.max_steps or math.ceil(train.epochs * loader.steps_per_epoch)
    if train.max_steps is None:
        raise ConfigError("train.max_steps: is required with data.streaming, because the length is not known")
    return StreamLoader(data.train, batch_size=train.batch_size, how=cut), train.max_steps


def read_template(job: Job) -> tuple[Any, ChatTemplate]:
    """The tokenizer, and the template as the data section wants it."""
    tokenizer, data = load_tokenizer(job.model), job.data
    return tokenizer, load_template(
        data.template, tokenizer, max_length=data.max_length, too_long=data.too_long, system=data.system
    )


def read_data(job: Job, console: Any = None) -> tuple[Any, ChatTemplate, Objective, Prepared]:
    """Tokenizer, template, objective and tokenised data: all that can be checked without a model."""
    data = job.data
    if not data.train:
        raise ConfigError("data.train: is required: a path, or a list of paths")
    if data.streaming and not job.train.shuffle:
        data = data.model_copy(update={"shuffle_buffer": 1})
    tokenizer, template = read_template(job)
    objective = build("objectives", job.objective)
    prepared = prepare(
        data, template, objective, seed=job.train.seed, cache_key=job.objective.model_dump_json(), console=console
    )
    return tokenizer, template, objective, prepared


def set_up(job: Job, engine: Engine, console: Any = None) -> Run:
    """Build the run. Raises TuneryError, before the model loads where it can."""
    job = resolve(job, engine)
    require(job.report)
    output = Path(job.output)
    resume = find_resume(job, output)
    open_folder(job, output, resume, engine)
    tokenizer, template, objective, data = read_data(job, console)
    if engine.is_main:
        write_config(job, output)
        data.report.write_refused(output / REFUSED)
    adapter = build("adapters", job.adapter)
    model, base_dtype = load_start(job, adapter, resume, engine)
    engine.same_weights(p for p in model.parameters() if p.requires_grad)
    if job.train.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    policy = CausalPolicy(model, dtype=engine.dtype, neftune=job.train.neftune)
    assert job.train.micro_tokens is not None
    packing = job.train.packing and policy.packs
    cut = Cut(job.train.micro_tokens, packing, engine.rank, engine.world)
    loader, total = make_loader(job, data, cut)
    if engine.is_main:
        written = math.ceil(total / save_interval(job, loader, total))
        checkpoint.check_room(output, bytes_to_write(model, adapter, min(job.train.keep or written, written)))
    groups = parameter_groups(model, adapter, job.optimizer.lr, job.optimizer.weight_decay)
    optimizer = build("optimizers", job.optimizer, groups)
    state = checkpoint.load_state(resume) if resume else {}
    if resume is not None:
        checkpoint.load_optimizer(resume, optimizer)
    return Run(
        job, engine, output, tokenizer, template, data, objective, adapter, model, policy, optimizer,
        [group["lr"] for group in groups], loader, cut, total, base_dtype, resume, state.get("step", 0), state,
        versions(),
    )  # fmt: skip


def data_counts(run: Run) -> DataCounts:
    """What became of the rows, for the report and the diagnosis."""
    report = run.data.report
    return DataCounts(
        read=report.rows,
        used=report.train.examples,
        refused=report.reasons(),
        truncated=report.train.truncated,
        tokens=report.train.tokens,
        labelled=report.train.labelled,
        eval_rows=len(run.data.eval) if run.data.eval is not None else 0,
    )
