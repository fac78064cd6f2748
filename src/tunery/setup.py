"""Everything a run needs before its first step. Configuration and data are read (read.py) and settled (resolve.py)
before; here come model, optimizer and loader, in the order in which they can be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunery import checkpoint
from tunery.config import build
from tunery.critic import Critic, give_values, trained_beside
from tunery.data.dataset import Prepared
from tunery.data.loader import Cut, Loader, StreamLoader
from tunery.data.store import TokenStore
from tunery.data.template import ChatTemplate
from tunery.diagnose import DataCounts
from tunery.engine import Engine
from tunery.errors import ModelError
from tunery.fallback import resumed
from tunery.job import Job, head_of
from tunery.models.fuse import fuse
from tunery.models.load import (
    ModelConfig,
    base_source,
    hook_attention,
    in_folder,
    load_config,
)
from tunery.models.recompute import recompute
from tunery.models.score import agree_on_padding, fitting_config, load_with_head
from tunery.models.value_head import load_value_head, save_value_head
from tunery.observe import put_back
from tunery.policy import CausalPolicy
from tunery.read import Read
from tunery.rollout.build import (
    check_device,
    load_rewards,
    make_rollouts,
)
from tunery.rollout.rollouts import Rollouts
from tunery.run_folder import versions
from tunery.teacher import load_teacher
from tunery.types import Objective


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
    loader: Loader | StreamLoader | Rollouts
    cut: Cut
    total_steps: int
    base_dtype: torch.dtype
    resume: Path | None
    start: int
    state: dict[str, Any]
    versions: dict[str, str]
    eval_tokens: int | None = None  # of a stream in an evaluation, once memory ran out in one
    critic: Critic | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save_weights(self, folder: Path) -> None:
        """The trained weights as anyone can load them, with the tokenizer and the template trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(self.model, folder, base_name(self.job.model))
        self.save_values(folder)
        save_tokenizer(self, folder)

    def save_values(self, folder: Path) -> None:
        """The value head, where there is one, in a file of its own, or the critic's adapter in a folder: who serves the
        model needs none."""
        if self.policy.value_head is not None:
            save_value_head(self.policy.value_head, folder)
        if self.critic is not None:
            self.critic.save(folder)

    def load_values(self, folder: Path) -> None:
        """What `save_values` wrote there."""
        if self.policy.value_head is not None:
            load_value_head(self.policy.value_head, folder)
        if self.critic is not None:
            self.critic.load(folder)


def base_name(model: ModelConfig) -> str:
    """What an adapter is an adapter of: the weights folder it started from, or the model's name."""
    return base_source(model).name


def save_tokenizer(run: Run, folder: Path) -> None:
    """The tokenizer with the chat template trained with, so that whoever serves the model renders the same."""
    own = run.tokenizer.chat_template
    if run.template.source is not None:
        run.tokenizer.chat_template = run.template.source
    run.tokenizer.save_pretrained(str(folder))
    run.tokenizer.chat_template = own


def bytes_to_write(run: Run, keep: int) -> int:
    """What the checkpoints of a run take at most: weights, and two float32 moments for what trains."""
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    whole = run.model.parameters() if run.adapter.whole else ()
    weights = max(trained, sum(p.numel() * p.element_size() for p in whole))
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
        _same_kind(job.model, source)
    engine.seed(job.train.seed, 0)
    attention = None if job.model.attention == "auto" else job.model.attention
    model: Any = load_with_head(head_of(job), source, dtype, engine.device, attention, seed=job.train.seed)
    if start is not None and start_adapter and adapter.whole and resume is None:
        from peft import PeftModel

        config = fitting_config(model, start, trains=False)
        model = PeftModel.from_pretrained(model, str(start), config=config).merge_and_unload()
    if job.model.attention == "auto":
        hook_attention(model, reference=job.kernels.attention == "reference")
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
    return in_folder(model, folder)


def _same_kind(base: ModelConfig, start: ModelConfig) -> None:
    """The weights to start from are of the model whose tokenizer is used. Raises ModelError otherwise."""
    ours, theirs = (load_config(model).get_text_config() for model in (base, start))
    for key in ("model_type", "vocab_size"):
        if getattr(ours, key) != getattr(theirs, key):
            raise ModelError(
                f"model.init_from: {start.name} has {key} {getattr(theirs, key)}, and {base.name} "
                f"{getattr(ours, key)}; start from weights of the same model, or give them as model.name"
            )


def parameter_groups(
    model: Any, adapter: Any, lr: float, weight_decay: float, beside: Mapping[str, torch.nn.Parameter]
) -> list[dict[str, Any]]:
    """Trainable parameters, of the model and `beside` it, by learning rate and decay. Biases, norms and other vectors
    are not decayed."""
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in [*model.named_parameters(), *beside.items()]:
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
    assert train.max_steps is not None  # check_job
    return StreamLoader(data.train, batch_size=train.batch_size, how=cut), train.max_steps


def announce(run: Run) -> list[str]:
    """What a person should know before the first step."""
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.parameters)
    dtype = str(run.engine.dtype).removeprefix("torch.")
    device = torch.cuda.get_device_name(run.engine.device) if run.engine.device.type == "cuda" else run.engine.device
    ranks = f" x {run.engine.world}" if run.engine.world > 1 else ""
    lines = [
        f"{run.job.model.name}: {trained:,} of {total:,} parameters train ({trained / total:.2%}, "
        f"{run.job.adapter.kind}); arithmetic in {dtype} on {device}{ranks}",
        *run.policy.notes,
    ]
    if run.resume is not None:
        lines.append(f"going on from {run.resume}: step {run.start} of {run.total_steps} is done")
    warmup = run.job.schedule.warmup
    if warmup > run.total_steps:
        lines.append(
            f"schedule.warmup is {warmup} steps and the run has {run.total_steps}, so the learning rate never "
            "reaches optimizer.lr"
        )
    return lines


def make_policy(job: Job, model: Any, dtype: torch.dtype, probe: bool = True) -> CausalPolicy:
    """The policy of a model with its adapter, the fast paths put into the model. `probe` as CausalPolicy's."""
    fused = fuse(model, job.kernels, dtype)
    policy = CausalPolicy(
        model, dtype=dtype, neftune=job.train.neftune, max_length=job.data.max_length, probe=probe,
        reference_head=job.kernels.head == "reference",
    )  # fmt: skip
    if fused.refused:
        policy.notes.append(
            f"{', '.join(sorted(fused.refused))} run the library's own code, because they do something that the fast "
            "paths do not (slower, same result)"
        )
    return policy


def shares_prompts(job: Job, read: Read, policy: CausalPolicy, engine: Engine) -> bool:
    """Whether what an example's sequences begin with alike is computed once; the same on every rank, since it decides
    the cut. Adds a note where it could be and this model cannot."""
    stores = [store for store in (read.data.train, read.data.eval) if isinstance(store, TokenStore)]
    alike = any((store.lengths_when_shared < store.lengths).any() for store in stores)
    unknown = job.data.streaming or getattr(read.objective, "generates", False)
    if not job.train.share_prompts or not (alike or unknown):
        return False
    both = policy.shares and (policy.teacher is None or policy.teacher.shares)
    if all(engine.gather(both and (policy.critic is None or policy.critic.shares))):
        return True
    if alike and policy.packs:  # a model that does not pack has said so
        why = "NEFTune's noise depends on their lengths" if policy.neftune else "its layers look back in other ways"
        policy.notes.append(
            f"what the sequences of an example have in common runs for each, because {why} (slower, same result)"
        )
    return False


def set_up(job: Job, engine: Engine, read: Read, resume: Path | None) -> Run:
    """Build the run on data already read. Raises TuneryError."""
    check_device(job, read.objective, engine)
    adapter = build("adapters", job.adapter)
    state = checkpoint.load_state(resume) if resume else {}
    job = resumed(job, state)
    put_back(read.objective, state.get("objective"))
    model, base_dtype = load_start(job, adapter, resume, engine)
    engine.same_weights(p for p in model.parameters() if p.requires_grad)
    if job.train.checkpointing != "none":
        recompute(model, job.train.checkpointing)
    policy = make_policy(job, model, engine.dtype)
    if policy.parts is not None and policy.parts.scalar:
        agree_on_padding(policy.causal, read.tokenizer, read.template)
    policy.teacher = load_teacher(job, engine)
    start = Path(job.model.init_from) if job.model.init_from else None
    critic = give_values(job, read.objective, policy, engine, resume or start, resumed=resume is not None)
    beside = trained_beside(policy, critic)
    groups = parameter_groups(model, adapter, job.optimizer.lr, job.optimizer.weight_decay, beside)
    optimizer = build("optimizers", job.optimizer, groups)
    if resume is not None:
        checkpoint.load_optimizer(resume, optimizer)
    assert job.train.micro_tokens is not None
    share = shares_prompts(job, read, policy, engine)
    cut = Cut(job.train.micro_tokens, job.train.packing, engine.rank, engine.world, share)
    if read.rewards is not None:
        policy.notes += load_rewards(job, read.rewards, model, adapter, read.tokenizer, read.template)
        loader, total = make_rollouts(
            job, read.data, read.objective, policy, read.tokenizer, read.template, read.rewards, engine, cut,
            state.get("step", 0),
        )  # fmt: skip
        if resume is not None:
            loader.load(resume)
    else:
        loader, total = make_loader(job, read.data, cut)
    return Run(
        job, engine, Path(job.output), read.tokenizer, read.template, read.data, read.objective, adapter, model,
        policy, optimizer, [group["lr"] for group in groups], loader, cut, total, base_dtype, resume,
        state.get("step", 0), state, versions(), critic=critic,
    )  # fmt: skip


def check_disk(run: Run) -> None:
    """Raises CheckpointError where the run's checkpoints do not fit on their disk."""
    written = math.ceil(
        run.total_steps
        / checkpoint.save_interval(run.job.train.save_every, run.loader.steps_per_epoch, run.total_steps)
    )
    keep = min(run.job.train.keep or written, written)
    checkpoint.check_room(run.output, bytes_to_write(run, keep))


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
        prompts=isinstance(run.loader, Rollouts),
    )
