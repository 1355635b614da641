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
from lightning_prune.reports.metric_mode import mode_by_name


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


@pytest.mark.parametrize(("start", "warns"), [(0, True), (1, False)])
def test_a_cut_before_any_validation_is_told(start, warns, recwarn):
    """What the dense model reached is not known then, so the guard cannot compare the cut with it."""
    fit(Scripted([0.9] * 6), FilterL1Pruning(0.5, schedule=OneShot(start)), MetricGuard("score", 0.1), epochs=3)
    told = [str(warning.message) for warning in recwarn]
    assert any("no validation came before this pruning step" in message for message in told) == warns


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
    """After a cut was taken back, half of it is tried, and half of that, and so on by that much to the whole amount."""
    diary = Diary()
    script = [0.9, 0.1, 0.1, 0.9, 0.9, 0.9]
    fit(Scripted(script), FilterL1Pruning(0.5, schedule=OneShot(1)), MetricGuard("score", 0.1, then="halve"), diary)
    assert diary.widths == [16, 8, 12, 14, 12, 10]


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
        assert diary.widths == [16, 8, 12, 8, 8, 8]  # nothing to wait for
        return
    assert diary.widths == [16, 8, 16, 12, 8, 8]


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


def test_a_harmful_step_of_many_does_not_end_pruning():
    """With ``halve``, a gradual schedule reaches its amount by steps of half the size, without a remainder."""
    diary = Diary()
    guard = MetricGuard("score", 0.1, then="halve")
    fit(Scripted([0.9, 0.1, *[0.9] * 10]), FilterL1Pruning(0.5, schedule=Linear(1, 2)), guard, diary, epochs=8)
    assert diary.widths == [16, 12, 14, 12, 10, 8, 8, 8]


def test_a_second_model_starts_anew():
    """A guard that is used again writes nothing of the first model into the second, and forgets the first's best."""
    guard, still = MetricGuard("score", 0.1, patience=3), partial(torch.optim.SGD, lr=0.0)

    class Still(Scripted):
        def configure_optimizers(self):
            return still(self.parameters())

    first, second = Still([0.9] * 3), Still([0.1] * 6)
    fit(first, FilterL1Pruning(0.5, schedule=OneShot(2)), guard, epochs=3)  # on probation when fit ends
    own = second.net[0].weight.detach().clone()
    fit(second, FilterL1Pruning(0.5, schedule=OneShot(4)), guard)
    assert second.net[0].out_features == 8
    kept = own.abs().sum(1).argsort(descending=True)[:8].sort().values
    assert torch.equal(second.net[0].weight, own[kept])


def test_a_second_fit_of_one_model_judges_its_own_cuts():
    """What was on probation when a fit ended is not taken back in the next, whose optimizers are others."""
    guard, pruning = MetricGuard("score", 0.1, patience=3), FilterL1Pruning(0.5, schedule=OneShot(2))
    model = Scripted([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    fit(model, pruning, guard, epochs=3)
    fit(model, pruning, guard)
    assert model.net[0].out_features == 8


def test_merged_cuts_are_announced():
    """Pruning steps that fall due while one is judged are made as one, and a warning says so beforehand."""
    diary = Diary()
    with pytest.warns(UserWarning, match=r"FilterL1Pruning: a pruning step .* before epoch 2, .*made as one") as told:
        fit(
            Scripted([0.9] * 6),
            FilterL1Pruning(0.5, schedule=Linear(1, 4)),
            MetricGuard("score", 0.1, patience=3),
            diary,
        )
    assert len([each for each in told if "made as one" in str(each.message)]) == 1
    assert diary.widths == [16, 14, 14, 14, 8, 8]


@pytest.mark.parametrize("without", ["data", "batches", "limit"])
def test_a_run_that_never_validates_is_refused(without):
    """No pruning step could be judged, so training does not start."""
    options = {"limit_val_batches": 0} if without == "limit" else {}
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[FilterL1Pruning(0.5), MetricGuard("score", 0.1)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, **options,
    )  # fmt: skip
    nothing = DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0)), 8)
    val = {"data": None, "batches": nothing, "limit": loader()}[without]
    with pytest.raises(PruningError, match="MetricGuard.*never validates"):
        trainer.fit(Scripted([0.9] * 2), loader(), val)
    assert trainer.global_step == 0


RARELY = [{"check_val_every_n_epoch": 2}, {"check_val_every_n_epoch": None, "val_check_interval": 8}]


@pytest.mark.parametrize("rarely", RARELY, ids=lambda rarely: "-".join(rarely))
@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_may_come_later_than_the_first_epoch(rarely, sanity):
    """Lightning makes the validation loaders when they are due; a guard waits for them."""
    model = Scripted([0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    diary = Diary()
    fit(model, FilterL1Pruning(0.5, schedule=OneShot(2)), MetricGuard("score", drop=0.1), diary,
        num_sanity_val_steps=sanity, **rarely)  # fmt: skip
    assert diary.widths == [16, 16, 8, 8, 16, 16]


@pytest.mark.parametrize("arguments", [{}, {"patience": 3}], ids=["no-validation", "patience"])
def test_a_last_cut_that_is_never_judged_is_said(arguments):
    """Training that ends between the last cut and its judgement says that nobody judged it."""
    model = Scripted([0.9] * 3 + [0.1] * 3)
    rarely = {} if arguments else {"check_val_every_n_epoch": 4, "num_sanity_val_steps": 0}
    told = r"MetricGuard\(monitor='score'\): training ended before the last pruning step was judged, after "
    with pytest.warns(UserWarning, match=told):
        fit(model, FilterL1Pruning(0.5, schedule=OneShot(4)), MetricGuard("score", drop=0.1, **arguments), **rarely)
    assert model.net[0].out_features == 8


def test_the_mode_is_that_of_callbacks_beside_it(caplog):
    """The mode of a ModelCheckpoint or EarlyStopping on the same metric holds; contradictions are refused."""
    falls = [1.0, 0.5, 0.4, 0.3, 0.2, 0.1]
    stopping = pl.callbacks.EarlyStopping("score", mode="min")
    diary = Diary()
    with caplog.at_level("INFO"):
        fit(Scripted(falls), FilterL1Pruning(0.5, schedule=OneShot(2)), MetricGuard("score", 0.1), stopping, diary)
    assert diary.widths == [16, 16, 8, 8, 8, 8]
    assert "MetricGuard(monitor='score'): mode='min', lower is better, by EarlyStopping" in caplog.text
    other = pl.callbacks.ModelCheckpoint(monitor="score", mode="max")
    with pytest.raises(PruningError, match="EarlyStopping.*ModelCheckpoint.*contradict|ModelCheckpoint.*EarlyStopping"):
        fit(
            Scripted(falls), FilterL1Pruning(0.5), MetricGuard("score", 0.1), stopping, other,
            enable_checkpointing=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["val_loss", "test/top1_error", "ppl", "val_rmse", "MAE", "wer", "val-nll", "eval/ce"])
def test_losses_and_errors_are_better_when_lower(name):
    """The mode follows from the name."""
    assert mode_by_name(name) == "min"


@pytest.mark.parametrize("name", ["val_acc", "score", "f1", "auroc", "mAP", "bleu", "dice", "accuracy", "maestro"])
def test_other_metrics_are_better_when_higher(name):
    """Whatever does not say loss, error or distance is better when higher."""
    assert mode_by_name(name) == "max"


def test_a_falling_loss_is_no_damage(caplog):
    """Without ``mode`` a metric called loss may fall as far as it likes, and the log says what was inferred."""

    class Loss(Scripted):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.script[self.current_epoch]))

    diary = Diary()
    with caplog.at_level("INFO"):
        fit(
            Loss([1.0, 0.5, 0.4, 0.3, 0.2, 0.1]), FilterL1Pruning(0.5, schedule=OneShot(2)),
            MetricGuard("val_loss", 0.01), diary,
        )  # fmt: skip
    assert diary.widths[-1] == 8
    assert "mode='min', lower is better, by its name" in caplog.text
