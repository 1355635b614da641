"""Loggers, offline: each gets the figures and the report of every way of pruning. Skipped where one is missing."""

import csv
import json

import fsspec
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    TaylorFilterPruning,
)
from lightning_prune.algorithms.schedules import FewUnits
from tests.runs import Net, fit, net

CALLBACKS = {
    "filters": lambda: FilterL1Pruning(0.5, schedule=Linear(1, 2)),
    "by-steps": lambda: TaylorFilterPruning(0.5, schedule=FewUnits(6, every=2, start=2), scope="global"),
    "masks": lambda: IterativeMagnitudePruning(0.5, schedule=Linear(1, 2), scope="global"),
    "after-training": lambda: OBSOneShot(0.5, batches=2, scope="global"),
}

EVERY_KIND = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)


def fitted(kind, logger):
    """The share that is left in the end."""
    callback = kind()
    fit(net(), callback, val=True, max_epochs=4, logger=logger, log_every_n_steps=1)
    return callback.history.left["prune/sparsity"]


@EVERY_KIND
def test_csv(kind, tmp_path):
    """The CSV logger's last figure is what is left, and the report lies beside it."""
    left = fitted(kind, CSVLogger(tmp_path, name=None, version=""))
    with open(tmp_path / "metrics.csv", newline="") as file:
        values = [row["prune/sparsity"] for row in csv.DictReader(file) if row["prune/sparsity"]]
    assert float(values[-1]) == pytest.approx(left) and (tmp_path / "pruning.html").exists()


@EVERY_KIND
def test_tensorboard(kind, tmp_path):
    """TensorBoard shows the figures as scalars and the picture as an image; the page lies in its folder."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    left = fitted(kind, TensorBoardLogger(tmp_path, name=None, version=""))
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Scalars("prune/sparsity")[-1].value == pytest.approx(left)
    assert found.Images("prune/report") and (tmp_path / "pruning.html").exists()


@EVERY_KIND
def test_wandb(kind, tmp_path, monkeypatch):
    """W&B, offline, has the figures in its summary, the picture among its media and the files as an artifact."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="pruning", offline=True)
    left = fitted(kind, logger)
    assert logger.experiment.summary["prune/sparsity"] == pytest.approx(left)
    wandb.finish()
    assert list(tmp_path.rglob("media/images/prune/report_*.png"))
    staged = [path for path in (tmp_path / "staged").rglob("*") if path.is_file()]
    assert any(b"<!DOCTYPE html>" in path.read_bytes() for path in staged)


@EVERY_KIND
def test_mlflow(kind, tmp_path, monkeypatch):
    """MLflow has the figures as metrics and the files as artifacts."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("pruning", tracking_uri=f"file:{tmp_path}", log_model=True)
    left = fitted(kind, logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["prune/sparsity"] == pytest.approx(left)
    names = {artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, "pruning")}
    assert names == {"pruning/pruning.html", "pruning/pruning.json", "pruning/pruning.png"}


class Noting(Logger):
    """Notes what it is handed, as a service would."""

    name, version, save_dir = "noting", "1", None

    def __init__(self):
        super().__init__()
        self.settings, self.artifacts, self.run_id = {}, [], "1"

    @property
    def experiment(self):
        return self

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        self.settings.update(params)

    def log_artifacts(self, run_id, folder, path):
        self.artifacts.append(path)


class MLFlowLike(Noting):
    def __init__(self, log_model, folder=None):
        super().__init__()
        self._log_model, self.save_dir = log_model, folder


MLFlowLike.__name__ = "MLFlowLogger"  # the report goes by this name, since two packages have one


def test_settings_of_all_callbacks_are_hyperparameters():
    """Every argument is logged under its callback's name; two of a class are numbered, and the guard's are there."""
    logger = Noting()
    callbacks = (
        FilterPruning({"first": 0.5}, criterion="l2", schedule=Linear(1, 2)),
        FilterPruning({"hidden": 0.25}, schedule=Linear(1, 2)),
        MetricGuard("val_loss", 9.0),
    )
    fit(net(), *callbacks, val=True, logger=logger)
    found = logger.settings
    assert found["prune/FilterPruning/criterion"] == "l2" and found["prune/FilterPruning-2/criterion"] == "l1"
    assert found["prune/FilterPruning/amount"] == "{'first': 0.5}"
    assert found["prune/FilterPruning/schedule"] == repr(Linear(1, 2))
    assert found["prune/MetricGuard/monitor"] == "val_loss" and found["prune/MetricGuard/drop"] == 9.0
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


class Configured(Net):
    """A module that saves a hyperparameter."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})


def test_tensorboard_shows_settings_beside_the_hyperparameters_of_the_module(tmp_path):
    """The first session that TensorBoard reads holds both, and both are in hparams.yaml; the module keeps its own."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import plugin_data_pb2

    module = net(Configured)
    fit(module, FilterL1Pruning(0.5), logger=TensorBoardLogger(tmp_path, name=None, version=""))
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert session["prune/FilterL1Pruning/amount"].number_value == 0.5 and session["lr"].number_value == 0.1
    saved = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert saved["prune/FilterL1Pruning/target"] == "filters" and saved["lr"] == 0.1
    assert not any(name.startswith("prune/") for name in module.hparams)


def test_csv_keeps_settings(tmp_path):
    """The CSV logger writes them to hparams.yaml."""
    fit(net(), OBSOneShot(0.5, batches=2), logger=CSVLogger(tmp_path, name=None, version=""))
    saved = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (saved["prune/OBSOneShot/amount"], saved["prune/OBSOneShot/solver"]) == (0.5, "admm")


def test_a_logger_that_takes_no_settings_costs_no_run():
    """What a logger raises is warned of, and training goes on."""

    class Refusing(Noting):
        def log_hyperparams(self, params):
            if any(name.startswith("prune/") for name in params):
                raise ValueError("changed since")

    with pytest.warns(UserWarning, match=r"settings .* Refusing: ValueError\('changed since'\)"):
        assert fit(net(), FilterL1Pruning(0.5), logger=Refusing()).state.finished


def test_mlflow_gets_artifacts_only_where_it_logs_models(tmp_path):
    """With ``log_model=False`` nothing is uploaded; the report lies beside checkpoints that are on this disk."""
    uploading, local, remote = MLFlowLike("all"), MLFlowLike(False, str(tmp_path)), MLFlowLike(False)
    fit(net(), FilterL1Pruning(0.5), logger=[uploading, local, remote])
    assert (uploading.artifacts, local.artifacts, remote.artifacts) == (["pruning"], [], [])
    assert (tmp_path / "noting" / "1" / "pruning.html").exists()


@pytest.mark.parametrize("made", [TensorBoardLogger, CSVLogger], ids=["TensorBoard", "CSV"])
def test_reports_go_to_remote_folders(made, tmp_path, monkeypatch):
    """A logger that writes to a URL has the report there, and nothing appears on this disk."""
    monkeypatch.chdir(tmp_path)
    callback = FilterL1Pruning(0.5)
    logger = made(f"memory://bucket/{made.__name__}")
    fit(net(), callback, logger=logger)
    remote = fsspec.filesystem("memory")
    history = json.loads(remote.cat(f"{logger.log_dir}/pruning.json"))
    assert history["model"] == callback.history.model
    assert remote.cat(f"{logger.log_dir}/pruning.png").startswith(b"\x89PNG")
    assert remote.cat(f"{logger.log_dir}/pruning.html").startswith(b"<!DOCTYPE html>")
    assert not list(tmp_path.iterdir())


SILENT = {
    "FilterL1Pruning": lambda **given: FilterL1Pruning(0.5, **given),
    "FilterPruning": lambda **given: FilterPruning(0.5, **given),
    "TaylorFilterPruning": lambda **given: TaylorFilterPruning(0.5, **given),
    "IterativeMagnitudePruning": lambda **given: IterativeMagnitudePruning(0.5, **given),
    "OBSOneShot": lambda **given: OBSOneShot(0.5, batches=2, **given),
}


@pytest.mark.parametrize("made", SILENT.values(), ids=SILENT)
def test_reports_can_be_switched_off(made, tmp_path, capsys):
    """``report=False`` of one callback: no tables, no files, no picture; what is left is logged all the same."""
    callbacks = made(report=False), IterativeMagnitudePruning(0.25, parameters=["head.weight"])
    if isinstance(callbacks[0], IterativeMagnitudePruning | OBSOneShot):
        callbacks = callbacks[:1]
    fit(net(), *callbacks, logger=CSVLogger(tmp_path, name=None, version=""))
    assert not list(tmp_path.rglob("pruning*")) and "Kept" not in capsys.readouterr().out
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert any(row.get("prune/sparsity") for row in csv.DictReader(file))
    with pytest.raises(TypeError, match="report='no'"):
        made(report="no")
