"""TensorBoard, Weights & Biases, MLflow and SwanLab, each through its own library, imported only when asked for.

A resumed run becomes a new one at W&B, MLflow and SwanLab, in the same group and named after the step it starts from,
because none of them can take back what an interrupted run logged after its last checkpoint. TensorBoard can."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tunery.errors import MissingExtraError

if TYPE_CHECKING:
    from tunery.job import ReportConfig

Loader = Callable[[str], Any]


class Tracker(Protocol):
    """Somewhere numbers go: `log` takes name -> value at an optimizer step, `finish` hands in what is left."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Event files in <output>/tensorboard; what was logged after `start_step` before is purged."""

    def __init__(self, output: Path, config: ReportConfig, start_step: int, job: Mapping[str, Any], loader: Loader):
        _load("tensorboard", "tensorboard", loader)  # torch's writer needs it, and would not name our extra
        module = _load("torch.utils.tensorboard", "tensorboard", loader)
        self._writer = module.SummaryWriter(
            log_dir=str(output / "tensorboard"), purge_step=start_step + 1 if start_step else None
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project at Weights & Biases, with the configuration; WANDB_MODE=offline keeps it local."""

    def __init__(self, output: Path, config: ReportConfig, start_step: int, job: Mapping[str, Any], loader: Loader):
        name = config.name or output.name
        self._run = _load("wandb", "wandb", loader).init(
            project=config.project,
            name=_run_name(name, start_step),
            group=name,
            dir=str(output),
            config=dict(job),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment named after the project, at MLFLOW_TRACKING_URI, else in <output>/mlflow.db. Through a
    client of its own, so that a run the caller has open stays the active one."""

    def __init__(self, output: Path, config: ReportConfig, start_step: int, job: Mapping[str, Any], loader: Loader):
        mlflow = _load("mlflow", "mlflow", loader)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            folder = output.resolve()
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlflow").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(config.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.project, artifacts)
        name = config.name or output.name
        run = self._client.create_run(number, run_name=_run_name(name, start_step), tags={"group": name})
        self._id = run.info.run_id
        self._client.log_dict(self._id, dict(job), "config.json")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name, value, step=step)

    def finish(self) -> None:
        self._client.set_terminated(self._id)


class SwanLab:
    """A run of the project at SwanLab, with the configuration; SWANLAB_MODE=local or offline keeps it local."""

    def __init__(self, output: Path, config: ReportConfig, start_step: int, job: Mapping[str, Any], loader: Loader):
        name = config.name or output.name
        self._swanlab = _load("swanlab", "swanlab", loader)
        self._swanlab.init(
            project=config.project,
            experiment_name=_run_name(name, start_step),
            logdir=str(output / "swanlab"),
            config=dict(job),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._swanlab.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "swanlab": SwanLab}


def require(config: ReportConfig, find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """Before anything expensive: raises MissingExtraError for a tracker of `config.to` that is not installed."""
    for name in config.to:
        if find(name) is None:
            raise MissingExtraError(name, name)


def make_trackers(
    config: ReportConfig,
    output: Path,
    start_step: int = 0,
    job: Mapping[str, Any] | None = None,
    loader: Loader = importlib.import_module,
) -> list[Tracker]:
    """The trackers of `config.to`. Raises MissingExtraError naming the extra of one that is not installed."""
    if config.to:
        output.mkdir(parents=True, exist_ok=True)  # they keep their local files in it
    return [TRACKERS[name](output, config, start_step, job or {}, loader) for name in config.to]


def _load(library: str, extra: str, loader: Loader) -> Any:
    try:
        return loader(library)
    except ImportError as error:
        raise MissingExtraError(library, extra) from error


def _run_name(name: str, start_step: int) -> str:
    return f"{name} from step {start_step}" if start_step else name
