"""MetricGuard takes back the cuts that a metric does not recover from."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    Linear,
    MetricGuard,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)


class Scripted(pl.LightningModule):
    """A net whose validation metric follows a script, one value an epoch."""

    def __init__(self, script):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        self.script = script

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.script[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Diary(Callback):
    """Notes the width of the first layer and a copy of all values at the end of every epoch."""

    def __init__(self):
        self.widths, self.values, self.momenta = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.widths.append(pl_module.net[0].out_features)
        self.values.append([p.detach().clone() for p in pl_module.parameters()])
        state = trainer.optimizers[0].state
        self.momenta.append([state[p]["exp_avg"].clone() for p in pl_module.parameters()])


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator))
    return DataLoader(data, 8)


def fit(model, *callbacks, epochs=6, **kwargs):
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**options, **kwargs})
    trainer.fit(model, loader(), loader(), ckpt_path=kwargs.pop("ckpt_path", None))
    return trainer


def test_a_harmful_cut_is_taken_back():
    """Weights, widths and momentum return to what they were before the cut, and nothing more is cut."""
    model, diary = Scripted([0.9, 0.9, 0.5, 0.9, 0.9, 0.9]), Diary()

    class AfterRollback(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 3 and batch_idx == 0:
                for now, then in zip(pl_module.parameters(), diary.values[1], strict=True):
                    assert torch.equal(now, then)
                state = trainer.optimizers[0].state
                for now, then in zip(pl_module.parameters(), diary.momenta[1], strict=True):
                    assert torch.equal(state[now]["exp_avg"], then)

    fit(model, FilterL1Pruning(0.5, schedule=OneShot(2)), MetricGuard("score", 0.1), diary, AfterRollback())
    assert diary.widths == [16, 16, 8, 16, 16, 16]
    assert model.net[0].in_features == 6
    assert model.net[2].weight.shape == (16, 16)


def test_a_harmless_cut_stays():
    """Within the drop of the best, pruning goes on to its end."""
    diary = Diary()
    fit(
        Scripted([0.9, 0.85, 0.82, 0.81, 0.95, 0.9]),
        FilterL1Pruning(0.5, schedule=Linear(1, 4)),
        MetricGuard("score", 0.1),
        diary,
    )
    assert diary.widths == [16, 14, 12, 10, 8, 8]


def test_halving_tries_smaller_steps():
    """After a cut was taken back, half of it is tried, and half of that."""
    diary = Diary()
    script = [0.9, 0.1, 0.1, 0.9, 0.9, 0.9]
    fit(Scripted(script), FilterL1Pruning(0.5, schedule=OneShot(1)), MetricGuard("score", 0.1, then="halve"), diary)
    assert diary.widths == [16, 8, 12, 14, 14, 14]


def test_patience_waits_for_recovery():
    """With patience, a metric that comes back in time is forgiven, and no further cut is made meanwhile."""
    diary = Diary()
    guard = MetricGuard("score", 0.1, patience=2)
    fit(Scripted([0.9, 0.2, 0.9, 0.2, 0.9, 0.9]), FilterL1Pruning(0.5, schedule=Linear(1, 2)), guard, diary)
    assert diary.widths == [16, 12, 12, 8, 8, 8]


def test_the_last_cut_is_judged_when_training_ends():
    """A run does not end with a cut that did harm; a loss is better when lower."""
    model, diary = Scripted([1.0, 1.0, 1.0, 1.0, 1.0, 9.0]), Diary()
    fit(model, MetricGuard("score", 0.1, mode="min"), FilterL1Pruning(0.5, schedule=OneShot(5)), diary)
    assert diary.widths[-1] == 8
    assert model.net[0].out_features == 16


@pytest.mark.parametrize(
    "kind",
    [
        FilterL1Pruning,
        TaylorFilterPruning,
        partial(TaylorFilterPruning, form="activations", scope="global"),
        partial(FilterPruning, criterion="apoz"),
        partial(FilterPruning, criterion="obd"),
        partial(FilterPruning, criterion="random"),
    ],
    ids=["l1", "taylor", "activations", "apoz", "obd", "random"],
)
def test_guards_every_callback(kind):
    """Whatever scores units, a cut is taken back, scores gather anew for the model as it was, and half is tried."""
    diary = Diary()
    pruning = kind(0.5, schedule=OneShot(1), scope="layer")
    script = [0.9, 0.1, 0.9, 0.9, 0.9, 0.9]
    fit(Scripted(script), pruning, MetricGuard("score", 0.1, then="halve"), diary)
    if kind in (FilterL1Pruning,) or getattr(kind, "keywords", {}).get("criterion") in ("obd", "random"):
        assert diary.widths == [16, 8, 12, 12, 12, 12]  # nothing to wait for
        return
    assert diary.widths == [16, 8, 16, 12, 12, 12]


def test_resume_on_probation(tmp_path):
    """A run that is stopped between a cut and its judgement goes on as if it had not been."""
    script = [0.9, 0.9, 0.5, 0.9, 0.9, 0.9]

    def callbacks():
        return FilterL1Pruning(0.5, schedule=OneShot(2)), MetricGuard("score", 0.1)

    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    pl.seed_everything(1)
    whole = Scripted(script)
    fit(whole, *callbacks(), saving, enable_checkpointing=True)
    resumed = Scripted(script)
    trainer = pl.Trainer(
        max_epochs=6, callbacks=list(callbacks()), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_metric_that_is_not_logged_is_named():
    """An unknown metric is refused after the first validation, with those that there are."""
    with pytest.raises(PruningError, match="score"):
        fit(Scripted([1.0] * 6), FilterL1Pruning(0.5, schedule=OneShot(2)), MetricGuard("accuracy", 0.1))


def test_a_metric_that_is_not_logged_is_told_before_training():
    """Sanity checking tells which metrics there are, if it shows another; the first validation without it ends it."""
    steps = []

    class Counted(Scripted):
        def on_before_optimizer_step(self, optimizer):
            steps.append(self.global_step)

        def on_sanity_check_end(self):  # comes after that of callbacks
            assert told.list and not steps

    with (
        pytest.warns(UserWarning, match="MetricGuard.*'scor'.*: validation logs score. Name one of these") as told,
        pytest.raises(PruningError, match="validation logs score. Name one of these"),
    ):
        fit(Counted([0.9] * 6), FilterL1Pruning(0.5), MetricGuard("scor", 0.1), num_sanity_val_steps=1)
    assert len(steps) == 4


def test_a_guard_alone_is_refused():
    """A guard without a pruning callback has nothing to guard."""
    with pytest.raises(PruningError, match="guards a pruning callback"):
        fit(Scripted([1.0] * 6), MetricGuard("score", 0.1))


@pytest.mark.parametrize(
    "bad", [{"drop": -1}, {"drop": float("nan")}, {"mode": "up"}, {"patience": 0}, {"then": "cry"}]
)
def test_bad_arguments_are_refused(bad):
    """Arguments out of range fail at construction and are named."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        MetricGuard(**{"monitor": "score", "drop": 0.1, **bad})
