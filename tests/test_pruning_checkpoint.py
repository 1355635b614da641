"""PruningCheckpoint keeps slim files, PruningEarlyStopping waits for the last pruning step, and a warning says why."""

import importlib
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterL1Pruning, Linear, MetricGuard, OBSOneShot, OneShot, load_from_checkpoint
from lightning_prune.callbacks import PruningCheckpoint, PruningEarlyStopping

FALLS = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]  # every epoch costs something, so the dense model is the best
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


def module_of(package="lightning.pytorch"):
    """A network of one of the packages whose validation metric follows a script, one value an epoch."""

    class Scripted(importlib.import_module(package).LightningModule):
        def __init__(self, script=tuple(FALLS)):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
            self.script = script

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("score", float(self.script[self.current_epoch]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Scripted


Scripted = module_of()


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator))
    return DataLoader(data, 8)


def fit(model, *callbacks, package="lightning.pytorch", epochs=6, ckpt_path=None):
    trainer = importlib.import_module(package).Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any("Checkpoint" in type(each).__name__ for each in callbacks),
    )  # fmt: skip
    trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def stop_after(trainer, epochs):
    trainer.should_stop = trainer.current_epoch == epochs - 1


def width(path):
    return len(torch.load(path, weights_only=True)["state_dict"]["net.0.weight"])


@pytest.mark.parametrize("package", PACKAGES)
def test_the_best_checkpoint_is_the_best_of_the_final_size(package, tmp_path):
    """Of a metric that falls with every epoch, the best is the first of the final size; no file of another is left."""
    kind = module_of(package)
    saving = PruningCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
    trainer = fit(kind(), FilterL1Pruning(0.5, schedule=Linear(1, 2)), saving, package=package)
    assert trainer.checkpoint_callback is saving
    assert Path(saving.best_model_path).name == "epoch=2-step=12.ckpt"
    assert float(saving.best_model_score) == pytest.approx(FALLS[2])
    assert {path.name: width(path) for path in tmp_path.iterdir()} == {"epoch=2-step=12.ckpt": 8, "last.ckpt": 8}
    assert load_from_checkpoint(kind, saving.best_model_path).net[0].out_features == 8


def test_the_best_of_each_size_can_be_kept(tmp_path):
    """With ``each_size`` there is one file per size, each the best of it."""
    saving = PruningCheckpoint(tmp_path, "{epoch}", "score", mode="max", each_size=True)
    fit(Scripted(), FilterL1Pruning(0.5, schedule=Linear(2, 4, every=2)), saving)
    found = {path.name: width(path) for path in tmp_path.iterdir()}
    assert found == {"epoch=0.ckpt": 16, "epoch=2.ckpt": 12, "epoch=4.ckpt": 8}
    assert Path(saving.best_model_path).name == "epoch=4.ckpt"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_it_keeps_the_same_files(at, tmp_path):
    """Stopped after any epoch and resumed, the files are those of the run that went through."""

    def callbacks(folder):
        pruning = FilterL1Pruning(0.5, schedule=Linear(1, 3, every=2))
        return pruning, PruningCheckpoint(tmp_path / folder, "{epoch}", "score", mode="max", save_last=True)

    fit(Scripted(), *callbacks("whole"))
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, _: stop_after(trainer, at))
    fit(Scripted(), *callbacks("parts"), stop)
    resumed = callbacks("parts")
    fit(Scripted(), *resumed, ckpt_path=tmp_path / "parts" / "last.ckpt")
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("whole", "parts")]
    assert files[0] == files[1] == ["epoch=3.ckpt", "last.ckpt"]
    assert Path(resumed[1].best_model_path).name == "epoch=3.ckpt"


def test_a_rollback_at_the_end_is_saved(tmp_path):
    """A model that a guard rolled back after the last epoch is in the best and in the last checkpoint."""
    saving = PruningCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
    guard = MetricGuard("score", 0.1, mode="max")
    model = Scripted([0.9] * 5 + [0.1])
    fit(model, FilterL1Pruning(0.5, schedule=OneShot(5)), guard, saving)
    assert model.net[0].out_features == width(saving.best_model_path) == width(saving.last_model_path) == 16
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_pruned_after_the_last_batch_is_saved(tmp_path):
    """OBSOneShot prunes when training ends; the best checkpoint holds its zeros."""
    saving = PruningCheckpoint(tmp_path, monitor="score", mode="max")
    model = Scripted()
    fit(model, OBSOneShot(0.5, batches=2), saving)
    saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.weight"], model.net[0].weight)
    assert int((saved["net.0.weight"] == 0).sum()) == 48


def outdated(kind, tmp_path, script=tuple(FALLS), **arguments):
    """Return what a run warns of checkpoints of another size."""
    saving = kind(tmp_path, monitor="score", mode="max", **arguments)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Scripted(list(script)), FilterL1Pruning(0.5, schedule=Linear(1, 2)), saving)
    return [str(each.message) for each in told if "holds a larger model" in str(each.message)]


def test_a_plain_checkpoint_of_the_dense_model_is_warned_of(tmp_path):
    """A ModelCheckpoint whose best is of another size than the model in the end is named, with its file."""
    (told,) = outdated(pl.callbacks.ModelCheckpoint, tmp_path / "plain")
    assert "ModelCheckpoint(monitor='score')" in told and "epoch=0-step=4.ckpt" in told and "PruningCheckpoint" in told
    assert not outdated(pl.callbacks.ModelCheckpoint, tmp_path / "rises", script=FALLS[::-1])
    assert not outdated(PruningCheckpoint, tmp_path / "ours")


@pytest.mark.parametrize("package", PACKAGES)
def test_patience_counts_once_pruning_is_finished(package):
    """The metric falls from the start; training ends ``patience`` validations after the first of the final size."""
    stopping = PruningEarlyStopping("score", mode="max", patience=2, stopping_threshold=0.85)
    model = module_of(package)([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    trainer = fit(model, stopping, FilterL1Pruning(0.5, schedule=Linear(1, 3)), package=package, epochs=8)
    assert trainer.current_epoch == 6  # epoch 3 is the best of the final size, 4 and 5 are worse
    assert float(stopping.best_score) == pytest.approx(0.6)
    assert model.net[0].out_features == 8


def test_a_metric_that_is_not_finite_stops_at_once():
    """Nothing is gained by pruning a model whose loss is NaN."""
    stopping = PruningEarlyStopping("score", mode="max", patience=2)
    trainer = fit(Scripted([0.9, float("nan"), *FALLS]), stopping, FilterL1Pruning(0.5, schedule=Linear(1, 3)))
    assert trainer.current_epoch == 2


def test_early_stopping_resumes(tmp_path):
    """Stopped after an epoch of the final size and resumed, training ends where it would have ended."""
    script = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]

    def callbacks():
        return PruningEarlyStopping("score", mode="max", patience=3), FilterL1Pruning(0.5, schedule=Linear(1, 2))

    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    assert fit(Scripted(script), *callbacks(), saving, epochs=8).current_epoch == 6
    for epoch in (1, 3, 4):
        resumed = fit(Scripted(script), *callbacks(), epochs=8, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.current_epoch == 6
