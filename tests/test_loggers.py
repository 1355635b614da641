"""Loggers, offline: each gets the figures and the report of every way of pruning. Skipped where one is missing."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, Linear, OBSOneShot, TaylorFilterPruning
from lightning_prune.algorithms.schedules import FewUnits
from tests.runs import fit, net

CALLBACKS = {
    "filters": lambda: FilterL1Pruning(0.5, schedule=Linear(1, 2)),
    "by-steps": lambda: TaylorFilterPruning(0.5, schedule=FewUnits(6, every=2, start=2), scope="global"),
    "masks": lambda: IterativeMagnitudePruning(0.5, schedule=Linear(1, 2), scope="global"),
    "after-training": lambda: OBSOneShot(0.5, batches=2, scope="global"),
}

pytestmark = pytest.mark.parametrize("kind", CALLBACKS.values(), ids=CALLBACKS)


def fitted(kind, logger):
    """The share that is left in the end."""
    callback = kind()
    fit(net(), callback, val=True, max_epochs=4, logger=logger, log_every_n_steps=1)
    return callback.history.left["prune/sparsity"]


def test_csv(kind, tmp_path):
    """The CSV logger's last figure is what is left, and the report lies beside it."""
    left = fitted(kind, CSVLogger(tmp_path, name=None, version=""))
    with open(tmp_path / "metrics.csv", newline="") as file:
        values = [row["prune/sparsity"] for row in csv.DictReader(file) if row["prune/sparsity"]]
    assert float(values[-1]) == pytest.approx(left) and (tmp_path / "pruning.html").exists()


def test_tensorboard(kind, tmp_path):
    """TensorBoard shows the figures as scalars and the picture as an image; the page lies in its folder."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    left = fitted(kind, TensorBoardLogger(tmp_path, name=None, version=""))
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert found.Scalars("prune/sparsity")[-1].value == pytest.approx(left)
    assert found.Images("prune/report") and (tmp_path / "pruning.html").exists()


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


def test_mlflow(kind, tmp_path, monkeypatch):
    """MLflow has the figures as metrics and the files as artifacts."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("pruning", tracking_uri=f"file:{tmp_path}")
    left = fitted(kind, logger)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.metrics["prune/sparsity"] == pytest.approx(left)
    names = {artifact.path for artifact in logger.experiment.list_artifacts(logger.run_id, "pruning")}
    assert names == {"pruning/pruning.html", "pruning/pruning.json", "pruning/pruning.png"}
