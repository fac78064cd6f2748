"""Oracles: TensorBoard's own reader for its files; for the others a stand-in module with the calls that the real
libraries (wandb 0.31, mlflow 3.17, swanlab 0.10) were seen to take."""

from types import SimpleNamespace

import pytest

from tunery.errors import MissingExtraError
from tunery.job import ReportConfig
from tunery.trackers import make_trackers, require

JOB = {"model": {"name": "builtin:tiny"}, "train": {"epochs": 3}}


class Calls:
    """Records what it is called with, by name."""

    def __init__(self, **results):
        self.made, self.results = [], results

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.made.append((name, args, kwargs))
            return self.results.get(name)

        return call


def one(kind, module, output, start_step=0, **config):
    config = ReportConfig(to=[kind], **config)
    (tracker,) = make_trackers(config, output, start_step, JOB, loader=lambda library: module)
    return tracker


def test_none_by_default(tmp_path):
    assert make_trackers(ReportConfig(), tmp_path) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "swanlab"])
def test_a_missing_library_names_its_extra(name, tmp_path):
    def loader(library):
        raise ImportError(library)

    with pytest.raises(MissingExtraError, match=rf"tunery\[{name}\]"):
        make_trackers(ReportConfig(to=[name]), tmp_path, loader=loader)
    with pytest.raises(MissingExtraError, match=rf"tunery\[{name}\]"):
        require(ReportConfig(to=[name]), find=lambda library: None)
    require(ReportConfig(to=[name]), find=lambda library: library == name or None)


def test_tensorboard_reads_back_and_a_resumed_run_purges(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (first,) = make_trackers(ReportConfig(to=["tensorboard"]), tmp_path)
    for step in range(1, 9):
        first.log({"train/loss": 1 / step}, step)
    first.finish()
    (resumed,) = make_trackers(ReportConfig(to=["tensorboard"]), tmp_path, start_step=5)
    for step in range(6, 11):
        resumed.log({"train/loss": 10.0 * step}, step)
    resumed.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in points] == list(range(1, 11))
    assert dict(points)[5] == pytest.approx(0.2) and dict(points)[6] == 60


def test_wandb(tmp_path):
    run = Calls()
    wandb = Calls(init=run)
    tracker = one("wandb", wandb, tmp_path / "runs", start_step=50, project="mine")
    assert (tmp_path / "runs").is_dir()  # else the library would write elsewhere
    ((_, _, made),) = wandb.made
    assert made["project"] == "mine" and made["config"] == JOB and made["dir"] == str(tmp_path / "runs")
    assert (made["name"], made["group"]) == ("runs from step 50", "runs")
    tracker.log({"train/loss": 2.0}, 55)
    tracker.finish()
    assert run.made == [("log", ({"train/loss": 2.0},), {"step": 55}), ("finish", (), {})]


def test_swanlab(tmp_path):
    swanlab = Calls()
    tracker = one("swanlab", swanlab, tmp_path, name="named")
    tracker.log({"train/loss": 2.0}, 5)
    tracker.finish()
    (init, made), *rest = [(name, kwargs or args) for name, args, kwargs in swanlab.made]
    assert init == "init" and made["experiment_name"] == "named" and made["config"] == JOB
    assert made["logdir"] == str(tmp_path / "swanlab")
    assert rest == [("log", {"step": 5}), ("finish", ())]
    assert swanlab.made[1][1] == ({"train/loss": 2.0},)


@pytest.mark.parametrize("server", [None, "http://tracking.example"])
def test_mlflow(tmp_path, server, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    client = Calls(create_experiment="e1", create_run=run)
    mlflow = Calls(MlflowClient=client)
    tracker = one("mlflow", mlflow, tmp_path, project="mine")
    assert mlflow.made[0][2] == {"tracking_uri": server or f"sqlite:///{tmp_path / 'mlflow.db'}"}
    tracker.log({"train/loss": 2.0, "train/lr": 0.1}, 5)
    tracker.finish()
    calls = {name: (args, kwargs) for name, args, kwargs in client.made}
    assert calls["create_experiment"][0][0] == "mine"
    assert calls["create_run"] == (("e1",), {"run_name": tmp_path.name, "tags": {"group": tmp_path.name}})
    assert calls["log_dict"] == (("r1", JOB, "config.json"), {})
    assert [args for name, args, _ in client.made if name == "log_metric"] == [
        ("r1", "train/loss", 2.0),
        ("r1", "train/lr", 0.1),
    ]
    assert calls["log_metric"][1] == {"step": 5} and calls["set_terminated"] == (("r1",), {})
