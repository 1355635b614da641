"""Runs that cannot be pruned are refused before the first step, with the model as it was; unusual ones work."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    IterativeMagnitudePruning,
    Linear,
    OBSOneShot,
    OneShot,
    PruningError,
    TaylorFilterPruning,
)
from lightning_prune.callbacks import WeightSharing
from tests.runs import (
    IMAGE,
    WIDTHS,
    Depthwise,
    Known,
    Net,
    assert_agrees_with_shapes,
    assert_same_weights,
    batches,
    fit,
    images,
    net,
    trainer,
    weights,
    widths,
)


class UsesLBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Sharded(SingleDeviceStrategy):
    """Stands for FSDP and DeepSpeed, which need a GPU."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


class Deaf(Net):
    """Its forward takes nothing that the loader gives, and its step wants gradients."""

    def forward(self, images, mask, scale):
        return super().forward(images * mask * scale)

    def training_step(self, batch, batch_idx):
        assert torch.is_grad_enabled()
        return F.cross_entropy(self(batch[0], torch.ones_like(batch[0]), 2), batch[1])


class Stiff(Net):
    """A single layer: its channels are the model's outputs."""

    def __init__(self):
        super().__init__()
        del self.first, self.norm, self.second, self.hidden

    def forward(self, images):
        return self.head(images.flatten(1)[:, :10])


@pytest.fixture
def refused():
    """Fit, expect an error, and expect that nothing has happened."""

    def fit_and_fail(module, *callbacks, error=PruningError, told, **arguments):
        steps, found = [], weights(module)
        module.optimizer_step = lambda *_, **__: steps.append(1)
        with pytest.raises(error, match=told):
            fit(module, *callbacks, **arguments)
        assert not steps
        assert_same_weights(module, found)
        assert_agrees_with_shapes(module)
        assert all(part.training for part in module.modules())
        assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks

    return fit_and_fail


# Ways of training


def test_lbfgs(refused):
    """LBFGS, whose state cannot be cut, is refused."""
    refused(net(UsesLBFGS), FilterL1Pruning(), told="LBFGS keeps one history.*AdamW")


def test_shards(refused):
    """Strategies that shard parameters are refused by name."""
    refused(net(), FilterL1Pruning(), strategy=Sharded("cpu"), told="Sharded splits parameters into shards.*'ddp'")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_spawned_processes(strategy):
    """Strategies that train in other processes, from which the slim model cannot return, are refused."""
    module = net()
    before = weights(module)
    with pytest.raises(Exception, match="(?s)FilterL1Pruning: DDPStrategy trains in processes.*strategy='ddp'"):
        fit(module, FilterL1Pruning(), strategy=strategy, devices=2)
    assert_same_weights(module, before)


def test_asynchronous_checkpoints(refused):
    """A plugin whose checkpoints could not be loaded again is refused."""
    refused(net(), FilterL1Pruning(), plugins=[AsyncCheckpointIO()], told="AsyncCheckpointIO.*Leave the plugin out")


# Other callbacks


@pytest.mark.parametrize("ours_first", [True, False])
def test_contradicting_callbacks(ours_first):
    """A callback that wraps what ours cuts is refused by name."""
    callbacks = [FilterL1Pruning(), ModelPruning("l1_unstructured", amount=0.1)][:: 1 if ours_first else -1]
    module = net()
    with pytest.raises(PruningError, match="FilterL1Pruning and ModelPruning contradict"):
        fit(module, *callbacks)
    assert_same_weights(module, weights(net()))


@pytest.mark.parametrize(
    "one, two",
    [
        ({"amount": 0.5}, {"amount": 0.3, "target": "flops", "ignore": ["hidden"]}),
        ({"amount": {"first": 0.5}}, {"amount": {"fir*": 0.3, "hidden": 0.1}}),
        ({"amount": 0.5, "ignore": ["first"]}, {"amount": {"second": 0.5}}),
    ],
    ids=["whole", "patterns", "mixed"],
)
@pytest.mark.parametrize("kind", [Net, Known])
def test_overlapping_callbacks(one, two, kind, refused):
    """Two of our callbacks that would prune the same channels are refused, both and the channels named."""
    refused(
        net(kind), FilterL1Pruning(**one), FilterL1Pruning(**two),
        told=r"FilterL1Pruning\(.*\) and FilterL1Pruning\(.*\) both prune .*ignore= or amount=",
    )  # fmt: skip


@pytest.mark.parametrize(
    "one, two",
    [
        (FilterL1Pruning(0.5), FilterL1Pruning(0.5)),
        (FilterL1Pruning(0.3), FilterL1Pruning(0.5, target="flops", schedule=OneShot(1))),
        (IterativeMagnitudePruning(0.3, scope="global"), IterativeMagnitudePruning(0.5, scope="global")),
    ],
    ids=["equal", "phases", "weights"],
)
def test_two_about_the_same(one, two, refused):
    """Two callbacks of a class that are about the same parts are refused in setup, both named, with what to do."""
    refused(net(), one, two, told=r"Pruning\(amount=0.*\) and .*Pruning\(amount=0.*are about the same parts.*Use one")


# Weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "callback, name",
    [
        (FilterL1Pruning(0.5), "second.weight"),
        (TaylorFilterPruning(0.5, scope="global"), "head.weight"),
        (IterativeMagnitudePruning(0.5, scope="global"), "head.weight"),
        (OBSOneShot(0.5, scope="global"), "first.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_weights_that_are_no_numbers(callback, name, value, refused):
    """A model with NaN or infinity among the weights to choose from is refused before the first step, by name."""
    module = net()
    with torch.no_grad():
        module.get_parameter(name).view(-1)[:3] = value
    told = f"{type(callback).__name__}: 3 of {module.get_parameter(name).numel()} entries of {name} are NaN or infinite"
    with pytest.raises(PruningError, match=told):
        fit(module, callback)
    assert widths(module) == WIDTHS and not module._state_dict_hooks


@pytest.mark.parametrize("kind", [FilterL1Pruning, IterativeMagnitudePruning])
def test_weights_that_diverge(kind):
    """Where weights are NaN once a cut is due, the run stops with what to do, and no cut is made."""

    class Diverges(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if self.current_epoch == 1 else 1)

    module = net(Diverges)
    with pytest.raises(PruningError, match="entries of first.weight are NaN or infinite.*lower the learning rate"):
        fit(module, kind(0.5, schedule=OneShot(2)))
    assert widths(module) == WIDTHS


# Amounts and schedules


@pytest.mark.parametrize("schedule", [OneShot(3), Linear(0, 3), Cubic(1, 20, 5)], ids=str)
def test_late_schedules(schedule, refused):
    """A schedule that ends after the last epoch is refused before training, with the last epoch possible."""
    refused(net(), FilterL1Pruning(schedule=schedule), told="max_epochs=3. End the schedule at epoch 2 or before")


@pytest.mark.parametrize("kind", [Net, Known])
def test_late_schedules_by_steps(kind, refused):
    """The same holds where the number of steps ends training."""
    refused(
        net(kind), FilterL1Pruning(schedule=OneShot(2)), max_epochs=-1, max_steps=8,
        told="max_steps=8, in epoch 1. End the schedule earlier",
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Net, Known])
def test_early_enough_schedules(kind):
    """A schedule whose last moment is the first batch of the last epoch, or the last step, is good."""
    for limits in ({"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}):
        module = net(kind)
        fit(module, FilterL1Pruning(amount=0.5, schedule=OneShot(2)), **limits)
        assert widths(module)["first"] == 4


@pytest.mark.parametrize("kind", [Net, Known])
@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"amount": {"frist": 0.5}}, r"'frist'.*names no module.*Near it: first"),
        ({"amount": {"norm": 0.5}}, "'norm'.*names no module that produces channels"),
        ({"ignore": ["sceond"]}, r"ignore='sceond' names no module of (Net|Known).*Near it: second"),
    ],
    ids=["amount", "no-producer", "ignore"],
)
def test_unknown_patterns(arguments, told, kind, refused):
    """A pattern that names nothing is refused, and names near it are told."""
    refused(net(kind), FilterL1Pruning(**arguments), error=ValueError, told=told)


@pytest.mark.parametrize("schedule", [None, OneShot(2)], ids=["now", "later"])
@pytest.mark.parametrize("kind", [Net, Known])
def test_amounts_out_of_reach(schedule, kind, refused):
    """A budget that cannot be reached is refused before epochs are spent on it, with the most that could go."""
    callback = FilterL1Pruning(amount=0.95, target="flops", ignore=["first"], schedule=schedule)
    refused(net(kind), callback, told="amount=0.95 of the flops cannot go.*% would be gone")


def test_pinned_by_name(refused):
    """An amount for the model's outputs is refused with the reason why they stay."""
    refused(net(), FilterL1Pruning(amount={"head": 0.5}), told=r"amount\['head'\].*stay")


@pytest.mark.parametrize("kind, ignore", [(Stiff, []), (Net, ["first", "second", "hidden"])], ids=["stiff", "ignored"])
def test_nothing_to_prune(kind, ignore, refused):
    """A model of which nothing can leave is refused with reasons."""
    refused(net(kind), FilterL1Pruning(ignore=ignore), told="Nothing is left to prune.*stays")


# Inputs


def test_forward_takes_nothing(refused):
    """Where forward accepts nothing of the first batch, the error says what was tried and what to do."""
    refused(
        net(Deaf), FilterL1Pruning(),
        told=r"(?s)Deaf.forward accepts nothing .*\(forward of batch\[0\]: TypeError.*example_inputs=",
    )  # fmt: skip


def test_deaf_models_can_be_told():
    """With example inputs such a model is pruned."""
    module = net(Deaf)
    x = torch.ones(1, 2, 6, 6)
    fit(module, FilterL1Pruning(amount=0.5, example_inputs=(x, x, 2)))
    assert widths(module)["first"] == 4


@pytest.mark.parametrize("inputs", [torch.zeros(1, 5, 6, 6), "image", 3], ids=["shape", "text", "number"])
def test_wrong_example_inputs(inputs, refused):
    """Example inputs that forward does not take are refused with forward's own words."""
    refused(net(), FilterL1Pruning(example_inputs=inputs), error=(PruningError, TypeError), told="example_inputs|fails")


def test_empty_example_inputs(refused):
    """Example inputs without an entry, on which nothing would be computed nor proved, are refused with their shapes."""
    refused(net(), FilterL1Pruning(example_inputs=IMAGE[:0]), told=r"hold no entries \(shapes \(0, 2, 6, 6\)\)")


# Small runs


@pytest.mark.parametrize("kind", [Net, Known, Depthwise])
@pytest.mark.parametrize("schedule", [None, Cubic(2, 20)], ids=["now", "later"])
def test_fast_dev_run(kind, schedule):
    """``fast_dev_run`` works, whenever the schedule ends."""
    module = net(kind)
    fit(module, FilterL1Pruning(amount=0.5, schedule=schedule), val=True, fast_dev_run=True)
    assert widths(module) == ({"first": 4, "second": 3, "hidden": 5} if schedule is None else WIDTHS)


@pytest.mark.parametrize(
    "limits",
    [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}],
    ids=lambda limits: "-".join(limits),
)
@pytest.mark.filterwarnings("ignore:.*limit_train_batches", "ignore:.*`max_epochs`")
def test_no_training(limits):
    """A run without batches leaves the model whole, and says so."""
    module = net(Known)
    before = weights(module)
    with pytest.warns(UserWarning, match="FilterL1Pruning: this run trained no batch, so it pruned nothing"):
        fit(module, FilterL1Pruning(amount=0.5), **limits)
    assert_same_weights(module, before)


@pytest.mark.filterwarnings("ignore")
def test_empty_loader():
    """A loader without examples leaves the model whole, and every callback that did nothing says so."""
    module = net()
    made = trainer(FilterL1Pruning(amount=0.5), WeightSharing())
    with (
        pytest.warns(UserWarning, match="trained no batch"),
        pytest.warns(UserWarning, match="no epoch began in which"),
    ):
        made.fit(module, DataLoader(TensorDataset(torch.zeros(0, 2, 6, 6), torch.zeros(0, dtype=torch.long))))
    assert widths(module) == WIDTHS


def test_batches_without_examples():
    """Empty batches are passed over: the model is traced on the first that holds an example, and cut as a whole."""
    empty, full = [(x[:n], y[:n]) for x, y in batches(8) for n in (0, 8)]
    module = net()
    trainer(FilterL1Pruning(amount=0.5), max_epochs=1).fit(module, DataLoader([empty, empty, full, full], None))
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}
    assert_agrees_with_shapes(module)


def test_batches_of_one():
    """Batches of one example work."""
    module = net()
    made = trainer(FilterL1Pruning(amount=0.5), max_epochs=1)
    made.fit(module, DataLoader(images(4), 1))
    assert widths(module)["first"] == 4


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages(stage):
    """Validation, testing and prediction prune nothing."""
    module = net()
    before = weights(module)
    module.predict_step = lambda batch, *_: module(batch[0])
    getattr(trainer(FilterL1Pruning(amount=0.5)), stage)(module, batches())
    assert_same_weights(module, before)
    assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
