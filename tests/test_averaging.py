"""Callbacks that average weights keep copies of the model, which are cut with it."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch.utils.data import DataLoader

from lightning_prune import (
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OneShot,
    load_from_checkpoint,
)
from lightning_prune.pruning import experts
from lightning_prune.surgery import take_shapes_
from tests import mixtures
from tests.newer_lightning import EMAWeightAveraging
from tests.runs import (
    Depthwise,
    Net,
    assert_agrees_with_shapes,
    assert_same_weights,
    batches,
    fit,
    net,
    trainer,
    weights,
    widths,
)

SLIM = {"first": 4, "second": 3, "hidden": 5}
AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.7),
    "swa": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2),
}


def copy_of(callback):
    """The averaged model that a callback holds."""
    return getattr(callback._average_model, "module", callback._average_model)


def kept_rows(before, after):
    """Which rows of one tensor are found in the other, by value."""
    return [next(i for i, row in enumerate(before) if torch.equal(row, kept)) for kept in after]


class AroundTheCut(Callback):
    """Copies the model and its average before ours runs and after it, in the epoch of the cut."""

    def __init__(self, averaging, epoch):
        self.averaging, self.epoch, self.seen = averaging, epoch, []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.seen.append((weights(pl_module), weights(copy_of(self.averaging))))


@pytest.mark.parametrize("kind", AVERAGING.values(), ids=AVERAGING)
def test_the_average_loses_the_same_units(kind):
    """A cut takes out of the average, which has other values than the model, the units that leave the model."""
    averaging = kind()
    before, after = AroundTheCut(averaging, 3), AroundTheCut(averaging, 3)
    module = net()
    fit(module, averaging, before, FilterL1Pruning(0.5, schedule=OneShot(3)), after, max_epochs=5)
    (live, average), (slim_live, slim_average) = before.seen[0], after.seen[0]
    first = kept_rows(live["first.weight"], slim_live["first.weight"])
    hidden = kept_rows(live["hidden.bias"], slim_live["hidden.bias"])
    assert widths(copy_of(averaging)) == SLIM and not torch.equal(live["first.weight"], average["first.weight"])
    assert torch.equal(slim_average["first.weight"], average["first.weight"][first])
    assert torch.equal(slim_average["norm.running_var"], average["norm.running_var"][first])
    assert torch.equal(slim_average["head.weight"], average["head.weight"][:, hidden])
    assert_agrees_with_shapes(copy_of(averaging))


@pytest.mark.parametrize("order", [1, -1], ids=["averaging first", "pruning first"])
@pytest.mark.parametrize("module_kind", [Net, Depthwise])
@pytest.mark.parametrize("kind", AVERAGING.values(), ids=AVERAGING)
def test_resumed_ends_where_uninterrupted_ends(kind, module_kind, order, tmp_path):
    """From the checkpoint of any epoch a run with averaging and pruning ends where the uninterrupted run ends."""

    def run(module, *more, ckpt_path=None):
        two = [kind(), FilterL1Pruning(0.5, schedule=Linear(1, 3))][::order]
        fit(module, *two, *more, ckpt_path=ckpt_path, max_epochs=5, enable_checkpointing=bool(more))
        return weights(module)

    whole = net(module_kind, dropout=0.0)
    expected = run(whole, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert widths(whole) == SLIM
    for epoch in range(4):
        resumed = net(module_kind, seed=5, dropout=0.0)
        run(resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_weights(resumed, expected)
        assert_agrees_with_shapes(resumed)


@pytest.mark.parametrize("order", [1, -1], ids=["averaging first", "pruning first"])
@pytest.mark.parametrize("module_kind", [Net, Depthwise])
def test_checkpoints_hold_the_slim_average(module_kind, order, tmp_path):
    """A checkpoint written beside EMA is tested, and loaded without a Trainer, with the averaged slim weights."""
    module, averaging = net(module_kind), AVERAGING["ema"]()
    saver = ModelCheckpoint(tmp_path)
    fit(module, *[averaging, FilterL1Pruning(0.5)][::order], saver, enable_checkpointing=True)
    average = weights(copy_of(averaging))
    loaded = load_from_checkpoint(module_kind, saver.best_model_path)
    assert_same_weights(loaded, average)
    tested = net(module_kind, seed=5)
    trainer(FilterL1Pruning(0.5)).test(tested, batches(), ckpt_path=saver.best_model_path, verbose=False)
    assert_same_weights(tested, average)
    assert_agrees_with_shapes(tested)


class Mixed(Net):
    """A mixture of six experts; before training, half of them may be removed."""

    def __init__(self, style="loop"):
        super().__init__(dropout=0.0)
        self.hidden = mixtures.net(style=style)

    def forward(self, images):
        return self.hidden(images.mean(dim=(2, 3)).repeat(1, 2))


@pytest.mark.parametrize("order", [1, -1], ids=["averaging first", "pruning first"])
@pytest.mark.parametrize("style", ["loop", "fused"])
def test_the_average_loses_removed_experts_when_a_run_is_resumed(style, order, tmp_path):
    """Of a run of a model with fewer experts a full-size one takes over experts, weights and average."""

    def run(module, *more, ckpt_path=None):
        averaging = AVERAGING["ema"]()
        pruning = IterativeMagnitudePruning(0.5, schedule=OneShot(1), report=False)
        two = [averaging, pruning][::order]
        fit(module, *two, *more, ckpt_path=ckpt_path, max_epochs=3, enable_checkpointing=bool(more))
        return weights(module), weights(copy_of(averaging))

    slim = net(Mixed, style=style)
    experts.prune_experts(slim.hidden, torch.randn(40, 4), 0.5)
    expected, average = run(slim, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert sum(map(torch.numel, expected.values())) < sum(map(torch.numel, weights(net(Mixed, style=style)).values()))
    for epoch in range(2):
        resumed = net(Mixed, seed=5, style=style)
        found = run(resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for one, other in zip(found, (expected, average), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_guard_gives_the_average_its_units_back():
    """A cut that is taken back is taken back in the average, too."""

    class Scripted(Net):
        def validation_step(self, batch, batch_idx):
            self.log("score", [0.9, 0.9, 0.5, 0.9][self.current_epoch])

    averaging = AVERAGING["ema"]()
    before, back = AroundTheCut(averaging, 2), AroundTheCut(averaging, 3)
    guard, pruning = MetricGuard("score", 0.1), FilterL1Pruning(0.5, schedule=OneShot(2))
    made = trainer(averaging, before, guard, pruning, back, max_epochs=4)
    made.fit(net(Scripted), batches(), DataLoader(batches().dataset, 8))
    for name, value in before.seen[0][1].items():
        assert torch.equal(back.seen[0][1][name], value), name


def test_nothing_stays_on_the_copies():
    """After a run the copies carry no hook that waits for the run's checkpoints, but what every pruned model has."""
    averaging = AVERAGING["ema"]()
    fit(net(), averaging, FilterL1Pruning(0.5))
    assert {hook.hook for hook in copy_of(averaging)._load_state_dict_pre_hooks.values()} <= {take_shapes_}
