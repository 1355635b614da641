"""Averages that callbacks of users, or attributes of a module, keep beside it lose the same units; teachers stay."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_prune import FilterL1Pruning, Linear, MetricGuard, OneShot
from tests.runs import Depthwise, Net, fit, net

HALF = 0.5  # of the weights is what every average begins at, so that it moves though nothing learns


def by_name(module):
    return {name: value * HALF for name, value in module.state_dict().items()}


def in_order(module):
    return [parameter.detach() * HALF for parameter in module.parameters()]


class Helper:
    """Keeps a list, as packages for averages do."""

    def __init__(self, module):
        self.shadow = in_order(module)


def halved(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(HALF)
    return module.requires_grad_(False)


# what is kept -> (how it is made, its tensors, those that it averages)
KEPT = {
    "a dict": (by_name, dict.values, lambda module: module.state_dict().values()),
    "a list": (in_order, iter, Net.parameters),
    "a helper": (Helper, lambda helper: helper.shadow, Net.parameters),
    "a copy": (lambda m: halved(copy.deepcopy(m)), Net.parameters, Net.parameters),
    "a part": (lambda m: halved(copy.deepcopy(m.second)), lambda p: p.parameters(), lambda m: m.second.parameters()),
    "torch's": (
        lambda m: halved(AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9))),
        lambda average: average.module.parameters(),
        Net.parameters,
    ),
}


class Averaging(Callback):
    """Averages weights; with ``inside``, in an attribute of the module."""

    def __init__(self, kept, inside=False):
        self.make, self.tensors_of, self.averaged = KEPT[kept]
        self.inside = inside

    def on_fit_start(self, trainer, pl_module):
        self.owner = pl_module if self.inside else self
        self.owner.kept = self.make(pl_module)

    def pairs(self, pl_module):
        return zip(self.tensors_of(self.owner.kept), self.averaged(pl_module), strict=True)

    def on_train_batch_end(self, trainer, pl_module, *args):
        with torch.no_grad():
            for average, own in self.pairs(pl_module):
                if own.is_floating_point():
                    average.lerp_(own, 0.1)


def pruning():
    return FilterL1Pruning(0.5, schedule=Linear(1, 2), report=False)


@pytest.mark.parametrize("kind", [Net, Depthwise])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("kept", "inside"), [*[(kept, False) for kept in KEPT], ("a dict", True), ("a helper", True)])
def test_averages_of_users_follow(kept, inside, first, kind):
    """An average of weights that do not learn is the same fraction of each, unit by unit."""
    module = net(lambda: kind(lr=0.0))
    averaging = Averaging(kept, inside)
    fit(module, *([averaging, pruning()] if first else [pruning(), averaging]))
    assert module.second.out_channels == 3
    parameters = {parameter.data_ptr() for parameter in module.parameters()}  # statistics of norms do learn
    for average, own in averaging.pairs(module):
        if own.data_ptr() in parameters:
            torch.testing.assert_close(average.detach(), own.detach() * (1 - HALF * 0.9**12), rtol=1e-4, atol=1e-6)
    if kept == "a copy":
        averaging.owner.kept(torch.zeros(2, 2, 6, 6))


class Keeping(Averaging):
    """Keeps what it made at the start."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pass


@pytest.mark.parametrize("kept", KEPT)
def test_what_does_not_move_stays(kept):
    """A teacher or the first weights, kept by a callback, stay what they were."""
    module = net(Net)
    keeping = Keeping(kept)
    full = [average.shape for average in keeping.tensors_of(keeping.make(module))]
    fit(module, keeping, pruning())
    assert [average.shape for average in keeping.tensors_of(keeping.kept)] == full


class Scripted(Net):
    """Validates to a number that falls after the first pruning step."""

    def validation_step(self, batch, batch_idx):
        self.log("score", 0.9 if self.current_epoch < 2 else 0.5)


@pytest.mark.parametrize("kept", KEPT)
def test_they_are_whole_again_when_a_cut_is_taken_back(kept):
    """A guarded run whose only cut was taken back ends with the averages of a run that has pruned nothing."""
    found = []
    for amount in (0.5, 0.0):
        module, averaging = net(lambda: Scripted(lr=0.0)), Averaging(kept)
        pruning = FilterL1Pruning(amount, schedule=OneShot(2), report=False)
        fit(module, averaging, pruning, MetricGuard("score", 0.1), val=True, max_epochs=4)
        parameters = {parameter.data_ptr() for parameter in module.parameters()}
        assert module.second.out_channels == 6
        found.append([average.detach() for average, own in averaging.pairs(module) if own.data_ptr() in parameters])
    # the batches of the epoch that was taken back are not averaged again
    shares = [1 - HALF * 0.9 ** (4 * epochs) for epochs in (3, 4)]
    for back, whole in zip(*found, strict=True):
        torch.testing.assert_close(back / shares[0], whole / shares[1], rtol=1e-4, atol=1e-6)
