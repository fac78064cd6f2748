"""The whole of a run's configuration: every section's `Config`, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema

from tunery.config import (
    Config,
    KindConfig,
    ShortForms,
    Steps,
    build,
    kind_field,
    validate,
)
from tunery.config_file import apply_overrides, read_config
from tunery.data.dataset import DataConfig
from tunery.errors import ConfigError
from tunery.kernels import KernelsConfig, one_word
from tunery.models.load import ModelConfig, ModelField
from tunery.models.rungs import RUNGS, RungName
from tunery.rollout.options import RolloutConfig
from tunery.schedule import ScheduleConfig


def _rung(value: Any) -> Any:
    return ("full" if value else "none") if isinstance(value, bool) else value


Checkpointing = Annotated[
    Literal["auto", RungName],
    BeforeValidator(_rung),
    WithJsonSchema({"enum": ["auto", *RUNGS, True, False]}),
]


class TrainConfig(Config):
    """The `train:` section: how long, how much at a time, how careful."""

    epochs: float = Field(default=3, gt=0, description="passes over the training data")
    max_steps: int | None = Field(default=None, gt=0, description="stop after this many optimizer steps instead")
    batch_size: int = Field(default=16, ge=1, description="examples per optimizer step, over all ranks")
    micro_tokens: int | None = Field(
        default=None,
        ge=8,
        description="tokens per forward; changes memory and speed, not the result (but dropout and noise, which are "
        "drawn for each)",
    )
    packing: bool = Field(default=True, description="several sequences in one stream; off: one each")
    share_prompts: bool = Field(
        default=True,
        description="compute what an example's sequences begin with alike (the prompt of two answers) once; changes "
        "memory and speed, never the result",
    )
    shuffle: bool = Field(default=True, description="a new order every epoch")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="clip the gradient's norm; null to not clip")
    neftune: float | None = Field(default=None, gt=0, description="NEFTune noise alpha on the embeddings (5 is usual)")
    checkpointing: Checkpointing = Field(
        default="auto",
        description="activations made again in the backward instead of kept: none, selective (keeps matmuls and "
        "attention), full (keeps each layer's input), offload (those in the host's memory); less memory and slower "
        "from left to right, same result. true: full, false: none",
    )
    save_every: Steps | None = Field(
        default=None,
        gt=0,
        description="steps between checkpoints, a share of the run below 1, null: every epoch, at most 500",
    )
    keep: int | None = Field(default=2, ge=1, description="checkpoints kept, the best one besides; null: all")
    resume: bool | str = Field(
        default=True, description="true: go on from the newest checkpoint in output; a path; false: start anew"
    )
    log_every: int = Field(default=5, ge=1, description="steps between lines of the log")
    seed: int = Field(default=42, ge=0, description="of everything random")


class EvalConfig(Config):
    """The `eval:` section: what is measured on the held-out rows, and when."""

    every: Steps | None = Field(
        default=None, gt=0, description="steps between evaluations, a share of the run below 1, null: every epoch"
    )
    generate: int = Field(
        default=0, ge=0, description="held-out rows to answer by generation before and after; 0: none"
    )
    max_new_tokens: int = Field(default=256, ge=1, description="longest generated answer")
    patience: int | None = Field(
        default=None, ge=1, description="stop early after this many evaluations without a better loss"
    )
    best: bool = Field(default=True, description="end with the checkpoint of the lowest evaluation loss")


Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab"]


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ReportConfig(Config):
    """The `report:` section: where the numbers go besides the run folder."""

    to: Annotated[list[Tracker], BeforeValidator(_list), ShortForms()] = Field(
        default=[], description="trackers, each an extra"
    )
    project: str = Field(default="tunery", description="project name for the trackers")
    name: str | None = Field(default=None, description="run name for the trackers; default: the output folder's name")


def _name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _rewards(value: Any) -> Any:
    """One reward or a list; "file.py:function" is short for a function."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, str) and item.endswith(".py"):
            raise ValueError(f"{item} says no function; write {item}:name_of_the_function")
    return [{"kind": "function", "path": item} if isinstance(item, str) and ":" in item else item for item in items]


def _sections_may_be_empty(schema: dict[str, Any]) -> None:
    """In a file, a section with nothing below it is one of defaults (see load_job)."""
    for name, section in schema["properties"].items():
        inner = {key: section.pop(key) for key in ("$ref", "anyOf", "type") if key in section}
        schema["properties"][name] = {"anyOf": [*inner.get("anyOf", [inner]), {"type": "null"}], **section}


class Job(Config):
    """Everything a run needs. Defaults make almost all of it optional."""

    model_config = ConfigDict(json_schema_extra=_sections_may_be_empty)

    model: Annotated[ModelField, ShortForms("name")] = Field(default=ModelConfig(), description="the base model")
    data: DataConfig = Field(default=DataConfig(), description="the rows")
    objective: kind_field("objectives", "objective", "sft") = Field(default="sft", description="what is optimised")  # type: ignore
    rewards: Annotated[
        list[kind_field("rewards", "rewards", "function")],  # type: ignore
        BeforeValidator(_rewards),
        ShortForms(),
    ] = Field(default=[], description="what generated answers are worth: kinds, or my_rewards.py:function")
    rollout: RolloutConfig = Field(default=RolloutConfig(), description="how prompts are answered while training")
    adapter: kind_field("adapters", "adapter", "lora") = Field(default="lora", description="which parameters train")  # type: ignore
    optimizer: kind_field("optimizers", "optimizer", "adamw") = Field(default="adamw", description="how they move")  # type: ignore
    schedule: Annotated[ScheduleConfig, BeforeValidator(_name), ShortForms("kind")] = Field(
        default=ScheduleConfig(), description="learning rate over time"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="how long, how much at a time")
    kernels: Annotated[KernelsConfig, BeforeValidator(one_word), ShortForms("attention")] = Field(
        default=KernelsConfig(), description="fast paths, or their references"
    )
    eval: EvalConfig = Field(default=EvalConfig(), description="measuring on held-out rows")
    report: ReportConfig = Field(default=ReportConfig(), description="trackers")
    output: str = Field(default="runs/tunery", description="the run folder")


def load_job(source: str | Path | Mapping[str, Any] | Job, overrides: Sequence[str] = ()) -> Job:
    """A Job from a YAML or JSON file or a mapping, with `key.sub=value` overrides. Raises ConfigError."""
    if not isinstance(source, str | Path | Mapping | Job):
        raise ConfigError(
            f"a job is the path of a YAML or JSON file, a mapping of the same shape, or a Job; got {source!r} "
            f"({type(source).__name__})"
        )
    if isinstance(source, Job):
        if not overrides:
            return source
        source = source.model_dump(mode="json")
    where = f"{source}: " if isinstance(source, str | Path) else ""
    values = read_config(source) if isinstance(source, str | Path) else source
    try:
        values = apply_overrides(values, overrides)
        # `train:` with every line below it commented out is a section of defaults
        return validate(Job, {k: v for k, v in values.items() if v is not None or k not in Job.model_fields})
    except ConfigError as error:
        raise ConfigError("\n".join(where + line for line in str(error).splitlines())) from None


def head_of(job: Job) -> str | None:
    """The head that the job's objective needs instead of the language model's own: "score", or None."""
    return getattr(build("objectives", job.objective), "head", None)


__all__ = ["EvalConfig", "Job", "KindConfig", "ReportConfig", "TrainConfig", "head_of", "load_job"]
