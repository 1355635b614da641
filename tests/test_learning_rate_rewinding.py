"""Learning rates after a pruning step are those from the step on to which schedules are set back."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from lightning_prune import FilterL1Pruning, IterativeMagnitudePruning, MetricGuard, OBSOneShot, OneShot, PruningError
from lightning_prune.algorithms.schedules import Linear
from lightning_prune.callbacks import LearningRateRewinding
from tests.runs import SIDE, Known

PER_EPOCH, EPOCHS = 4, 6


def batches():
    torch.manual_seed(3)
    return DataLoader([(torch.randn(2, SIDE, SIDE), i % 3) for i in range(8)], batch_size=2)


SCHEDULERS = {
    "step": lambda o: {"scheduler": lr_scheduler.StepLR(o, 3, 0.5), "interval": "step"},
    "cosine by epochs": lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 10)},
    "one cycle": lambda o: {
        "scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=PER_EPOCH * EPOCHS), "interval": "step",
    },
    "constant": lambda o: {"scheduler": lr_scheduler.ConstantLR(o, 1.0)},
    "lambda": lambda o: {"scheduler": lr_scheduler.LambdaLR(o, lambda at: 1 / (1 + at)), "interval": "step"},
    "one after another": lambda o: {
        "scheduler": lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
        "interval": "step",
    },
}  # fmt: skip


class Lit(Known):
    """Notes learning rate and momentum of every step."""

    def __init__(self, scheduler="step"):
        super().__init__(dropout=0.0)
        self.scheduler = scheduler
        self.used = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": SCHEDULERS[self.scheduler](optimizer)}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        group = optimizer.param_groups[0]
        self.used.append((float(group["lr"]), group["momentum"]))


def fit(module, *callbacks, epochs=EPOCHS, ckpt_path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, **quiet, **options}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return module.used


PRUNING = {
    "filters": lambda **schedule: FilterL1Pruning(0.5, **schedule),
    "weights": lambda **schedule: IterativeMagnitudePruning(0.5, **schedule),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", PRUNING)
@pytest.mark.parametrize("to", [0, 2, 4])
def test_the_schedule_goes_on_from_the_step_it_is_set_back_to(scheduler, kind, to):
    """The learning rates of a run without this callback, from that step on, follow the pruning step."""
    plain = fit(Lit(scheduler))
    found = fit(Lit(scheduler), PRUNING[kind](schedule=OneShot(3)), LearningRateRewinding(to))
    cut = 3 * PER_EPOCH
    expected = plain[to:] if scheduler != "cosine by epochs" else plain[to // PER_EPOCH * PER_EPOCH :]
    assert found[:cut] == plain[:cut]
    assert found[cut:] == expected[: len(found) - cut]


def test_every_pruning_step_sets_schedules_back_wherever_the_callback_stands():
    """Two pruning steps, and the callback before the one that prunes."""
    plain = fit(Lit())
    found = fit(Lit(), LearningRateRewinding(), FilterL1Pruning(0.5, schedule=Linear(2, 4, every=2)))
    assert found == plain[: 2 * PER_EPOCH] * 3


def test_all_but_the_learning_rate_stays():
    """With a constant learning rate the run is one without this callback, to the bit."""
    found = []
    for more in ([], [LearningRateRewinding()]):
        torch.manual_seed(0)
        module = Lit("constant")
        fit(module, FilterL1Pruning(0.5, schedule=OneShot(2)), *more)
        found.append(module.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path, epoch):
    """Stopped before the pruning step, and behind it."""

    def callbacks():
        return FilterL1Pruning(0.5, schedule=OneShot(3)), LearningRateRewinding(2)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(Lit(), *callbacks(), saving, enable_checkpointing=True)
    resumed = fit(Lit(), *callbacks(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert resumed == whole[(epoch + 1) * PER_EPOCH :]


def test_a_second_run_goes_back_to_its_own_learning_rate():
    """The same callback beside the same module, which trains with another learning rate now."""
    module, rewinding = Lit(), LearningRateRewinding()
    fit(module, FilterL1Pruning(0.5, schedule=OneShot(3)), rewinding)
    module.used, module.hparams.lr = [], 0.01
    fit(module, FilterL1Pruning(0.5, schedule=OneShot(3)), rewinding)
    cut = 3 * PER_EPOCH
    assert module.used[cut:] == module.used[:cut] and module.used[0][0] == 0.01


class Worse(Lit):
    """Has a metric that falls when the model is pruned."""

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.first.out_channels))


def test_a_step_that_is_rolled_back_sets_nothing_back_again():
    """The learning rate goes on from where the pruning step had set it."""
    module = Worse()
    guard = MetricGuard("score", drop=0.1, mode="max")
    trainer = pl.Trainer(
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[FilterL1Pruning(0.5, schedule=OneShot(2)), guard, LearningRateRewinding()],
    )  # fmt: skip
    trainer.fit(module, batches(), batches())
    plain = fit(Lit())
    assert module.first.out_channels == 8
    assert module.used == plain[: 2 * PER_EPOCH] + plain[: 4 * PER_EPOCH]


class Bare(Known):
    """Has no scheduler."""


@pytest.mark.parametrize(
    ("module", "callbacks", "told"),
    [
        (Lit, [LearningRateRewinding()], "no callback prunes"),
        (Bare, [FilterL1Pruning(0.5), LearningRateRewinding()], "no learning-rate scheduler"),
        (Lit, [FilterL1Pruning(0.5, schedule=OneShot(1)), LearningRateRewinding(7)], "comes after 4 optimizer steps"),
        (Lit, [OBSOneShot(0.5), LearningRateRewinding(2)], "comes after the last batch"),
        (
            Lit,
            [StochasticWeightAveraging(0.01), FilterL1Pruning(0.5, schedule=OneShot(1)), LearningRateRewinding()],
            "and StochasticWeightAveraging contradict",
        ),
        (
            Lit,
            [
                GradientAccumulationScheduler({0: 1, 1: 2}),
                FilterL1Pruning(0.5, schedule=OneShot(1)),
                LearningRateRewinding(5),
            ],
            "pruning step comes after 4",
        ),
    ],
)
def test_what_cannot_be_set_back_is_refused(module, callbacks, told):
    """With the reason."""
    with pytest.raises(PruningError, match=told):
        fit(module(), *callbacks)


def test_a_step_that_has_passed_is_refused(tmp_path):
    """A run that is resumed without what was saved then."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Lit(), FilterL1Pruning(0.5, schedule=OneShot(3)), saving, enable_checkpointing=True, epochs=4)
    with pytest.raises(PruningError, match="training starts at step 8"):
        fit(
            Lit(),
            FilterL1Pruning(0.5, schedule=OneShot(3)),
            LearningRateRewinding(),
            ckpt_path=tmp_path / "epoch=1.ckpt",
        )


@pytest.mark.parametrize("to", [-1, True, 0.5, None])
def test_a_number_of_steps_is_asked_for(to):
    """Nothing else is one."""
    with pytest.raises(ValueError, match="number of optimizer steps"):
        LearningRateRewinding(to)
