"""The whole of a run's configuration: every section's `Config`, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunery.config import Config, KindConfig, apply_overrides, kind_field, read_config, validate
from tunery.data.dataset import DataConfig
from tunery.errors import ConfigError
from tunery.models.load import ModelConfig, ModelField
from tunery.schedule import ScheduleConfig


class TrainConfig(Config):
    """The `train:` section: how long, how much at a time, how careful."""

    epochs: float = Field(3, gt=0, description="passes over the training data")
    max_steps: int | None = Field(None, gt=0, description="stop after this many optimizer steps instead")
    batch_size: int = Field(16, ge=1, description="examples per optimizer step, over all ranks")
    micro_tokens: int | None = Field(
        None, ge=8, description="tokens per forward; changes memory and speed, never the result"
    )
    packing: bool = Field(True, description="several sequences in one stream; off gives one each, same result")
    shuffle: bool = Field(True, description="a new order every epoch")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's norm; null to not clip")
    neftune: float | None = Field(None, gt=0, description="NEFTune noise alpha on the embeddings (5 is usual)")
    checkpointing: bool = Field(False, description="recompute activations in the backward: less memory, slower")
    save_every: int | float | None = Field(
        None, gt=0, description="checkpoint every n steps, or a share of the run below 1"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept, the best one besides")
    resume: bool | str = Field(
        True, description="true: go on from the newest checkpoint in output; a path; false: start anew"
    )
    log_every: int = Field(5, ge=1, description="steps between lines of the log")
    seed: int = Field(42, ge=0, description="of everything random")


class EvalConfig(Config):
    """The `eval:` section: what is measured on the held-out rows, and when."""

    every: int | float | None = Field(
        None, gt=0, description="steps between evaluations, a share of the run below 1, null: at the end"
    )
    generate: int = Field(0, ge=0, description="held-out rows to answer by generation before and after; 0: none")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer")
    patience: int | None = Field(None, ge=1, description="stop early after this many evaluations without a better loss")
    best: bool = Field(True, description="end with the checkpoint of the lowest evaluation loss")


class ReportConfig(Config):
    """The `report:` section: where the numbers go besides the run folder."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "swanlab"]] = Field([], description="trackers, each an extra")
    project: str = Field("tunery", description="project name for the trackers")
    name: str | None = Field(None, description="run name for the trackers; default: the output folder's name")


def _name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class Job(Config):
    """Everything a run needs. Defaults make almost all of it optional."""

    model: ModelField = Field(ModelConfig(), description="the base model")
    data: DataConfig = Field(DataConfig(), description="the rows")
    objective: kind_field("objectives", "objective", "sft") = Field("sft", description="what is optimised")  # type: ignore
    adapter: kind_field("adapters", "adapter", "lora") = Field("lora", description="which parameters train")  # type: ignore
    optimizer: kind_field("optimizers", "optimizer", "adamw") = Field("adamw", description="how they move")  # type: ignore
    schedule: Annotated[ScheduleConfig, BeforeValidator(_name)] = Field(
        ScheduleConfig(), description="learning rate over time"
    )
    train: TrainConfig = Field(TrainConfig(), description="how long, how much at a time")
    eval: EvalConfig = Field(EvalConfig(), description="measuring on held-out rows")
    report: ReportConfig = Field(ReportConfig(), description="trackers")
    output: str = Field("runs/tunery", description="the run folder")


def load_job(source: str | Path | Mapping[str, Any] | Job, overrides: Sequence[str] = ()) -> Job:
    """A Job from a YAML or JSON file or a mapping, with `key.sub=value` overrides. Raises ConfigError."""
    if isinstance(source, Job):
        if not overrides:
            return source
        source = source.model_dump(mode="json")
    where = f"{source}: " if isinstance(source, str | Path) else ""
    values = read_config(source) if isinstance(source, str | Path) else dict(source)
    try:
        return validate(Job, apply_overrides(values, overrides))
    except ConfigError as error:
        raise ConfigError("\n".join(where + line for line in str(error).splitlines())) from None


__all__ = ["EvalConfig", "Job", "KindConfig", "ReportConfig", "TrainConfig", "load_job"]
