"""Everything a run needs before its first step, built in the order in which it can be wrong: configuration, folder,
data, and only then the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunery import checkpoint
from tunery.config import build
from tunery.critic import Critic, check_critic, give_values, trained_beside
from tunery.data.dataset import Prepared, prepare
from tunery.data.loader import Cut, Loader, StreamLoader
from tunery.data.store import TokenStore
from tunery.data.template import ChatTemplate, load_template
from tunery.devices import Device, this_device
from tunery.diagnose import DataCounts
from tunery.engine import Engine, check_dtype
from tunery.errors import ConfigError, ModelError
from tunery.fallback import resumed
from tunery.job import Job, head_of, load_job
from tunery.models.fuse import fuse
from tunery.models.load import (
    ModelConfig,
    base_source,
    hook_attention,
    in_folder,
    load_config,
    load_tokenizer,
    resolve_name,
)
from tunery.models.recompute import recompute
from tunery.models.score import agree_on_padding, fitting_config, load_with_head
from tunery.models.value_head import load_value_head, save_value_head
from tunery.observe import put_back
from tunery.plan.choose import choose
from tunery.plan.work import AssumedRows
from tunery.policy import CausalPolicy
from tunery.rollout.build import (
    check_device,
    check_rollouts,
    generates,
    load_rewards,
    make_rewards,
    make_rollouts,
)
from tunery.rollout.rollouts import Rollouts
from tunery.rollout.scoring import Rewards
from tunery.run_folder import CONFIG, find_resume, versions
from tunery.teacher import check_kept, check_teacher, load_teacher
from tunery.trackers import require
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


def resolve(job: Job, engine: Engine, read: Read | None = None) -> Job:
    """The job with everything left to us decided, so that the saved configuration reproduces the run elsewhere.
    `read`: its data, for the micro-batches that fit memory."""
    optimizer, model = job.optimizer, job.model
    adapter = build("adapters", job.adapter)
    if getattr(optimizer, "lr", 0.0) is None:
        optimizer = optimizer.model_copy(update={"lr": adapter.default_lr})
    model = model.model_copy(update={"dtype": str(engine.dtype).removeprefix("torch.")})
    job = job.model_copy(update={"optimizer": optimizer, "model": model})
    tokens, rung = _saved_cut(job) or _chosen_cut(job, engine, read)
    train = job.train.model_copy(update={"micro_tokens": tokens, "checkpointing": rung})
    return job.model_copy(update={"train": train})


def _saved_cut(job: Job) -> tuple[int, str] | None:
    """train.micro_tokens and train.checkpointing of the run that is gone on with, where the job leaves them open: the
    same streams round the same, wherever and beside whatever the run goes on."""
    checkpoint_folder = find_resume(job, Path(job.output))
    saved = checkpoint_folder.parent / CONFIG if checkpoint_folder is not None else None
    if saved is None or not saved.is_file():
        return None
    train, then = job.train, load_job(saved).train
    rung = then.checkpointing if train.checkpointing == "auto" else train.checkpointing
    tokens = train.micro_tokens or then.micro_tokens
    return None if tokens is None or rung == "auto" else (tokens, rung)


def _chosen_cut(job: Job, engine: Engine, read: Read | None) -> tuple[int, str]:
    """The same by plan, for the rank with the least memory."""
    job, rows = planned(job, read)
    device = for_training(this_device(engine.device.type), job)
    memory = min(engine.gather(device.memory))
    if device.kind == "cpu":
        memory //= engine.world
    return engine.gather(choose(job, rows, replace(device, memory=memory), engine.world))[0]


def planned(job: Job, read: Read | None) -> tuple[Job, TokenStore | AssumedRows]:
    """The rows a plan is made for, and the job that takes them. Of rows that nobody has read each is taken to be as
    long as it may be, and so are answers to be generated: a step takes those of its prompts one by one."""
    data = read.data.train if read is not None else None
    rows = data if isinstance(data, TokenStore) else AssumedRows(job.train.batch_size, job.data.max_length)
    if read is None or read.rewards is None:
        return job, rows
    answers = max(1, job.train.batch_size * job.rollout.group // job.rollout.minibatches)
    longest = int(rows.lengths.max()) + job.rollout.max_new_tokens
    train = job.train.model_copy(update={"batch_size": answers})
    return job.model_copy(update={"train": train}), AssumedRows(answers, longest)


def for_training(device: Device, job: Job) -> Device:
    """The device without the memory that a generator of rollouts takes for itself."""
    if not generates(build("objectives", job.objective)):
        return device
    return replace(device, memory=int(device.memory * job.rollout.left))


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


def check_job(job: Job) -> None:
    """What can be wrong with a configuration as a whole. Raises ConfigError."""
    data, model = job.data, job.model
    if not data.train:
        raise ConfigError("data.train: is required: a path, or a list of paths")
    if data.streaming and job.train.max_steps is None:
        raise ConfigError("train.max_steps: is required with data.streaming, because the length is not known")
    check_dtype(model.dtype)
    require(job.report)
    if data.eval is None:
        for key, value in (("patience", job.eval.patience), ("generate", job.eval.generate or None)):
            if value is not None:
                raise ConfigError(f"eval.{key}: {value} needs held-out rows; set data.eval to a file or a fraction")
    if head_of(job) is not None and job.eval.generate:
        raise ConfigError(
            f"eval.generate: {job.eval.generate}, but objective {job.objective.kind} makes a model that scores answers "
            "and gives none; set it to 0"
        )
    if model.random_init and not build("adapters", job.adapter).whole:
        raise ConfigError(
            "model.random_init: an adapter of random weights fits no base that anyone has; use adapter: full"
        )
    folder = Path(resolve_name(model.name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model: {model.name} is an adapter; give its base as model.name and the adapter as model.init_from"
        )
    if folder.is_dir() and model.revision is not None:
        raise ConfigError(f"model.revision: {model.name} is a local folder, which has no revisions")


def read_template(job: Job) -> tuple[Any, ChatTemplate]:
    """The tokenizer, and the template as the data section wants it."""
    tokenizer, data = load_tokenizer(job.model), job.data
    return tokenizer, load_template(
        data.template, tokenizer, max_length=data.max_length, too_long=data.too_long, system=data.system
    )


@dataclass
class Read:
    """What can be read and checked without a model."""

    tokenizer: Any
    template: ChatTemplate
    objective: Objective
    data: Prepared
    rewards: Rewards | None = None


def read_data(job: Job, console: Any = None) -> Read:
    """Tokenizer, template, objective and tokenised data. Happens before the engine starts, because a process that has
    touched CUDA cannot fork the ones that tokenise."""
    data = job.data
    check_job(job)
    if data.streaming and not job.train.shuffle:
        data = data.model_copy(update={"shuffle_buffer": 1})
    tokenizer, template = read_template(job)
    objective = build("objectives", job.objective)
    check_rollouts(job, objective)
    check_teacher(job, tokenizer)
    check_critic(job, objective)
    prepared = prepare(
        data, template, objective, seed=job.train.seed, cache_key=job.objective.model_dump_json(), console=console
    )
    check_kept(job, [prepared.train, prepared.eval])
    rewards = make_rewards(job, prepared) if generates(objective) else None
    return Read(tokenizer, template, objective, prepared, rewards)


def beyond_context(job: Job, data: Prepared) -> str | None:
    """A warning where rows are longer than the model's context. Raises ConfigError where the model has a learned
    embedding for each position, and none beyond."""
    text = load_config(job.model).get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is None or not isinstance(data.train, TokenStore):
        return None
    longer = int((np.diff(data.train.sequence_offsets) > context).sum())
    if not longer:
        return None
    what = f"{longer:,} sequences are longer than the {context} tokens {job.model.name} was made for"
    if not (getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)):
        raise ConfigError(f"data.max_length: {what}, and it has no positions beyond; set it to {context} at most")
    return f"{what}; it may not make sense of what comes after. Set data.max_length to {context}"


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
