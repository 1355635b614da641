"""Moving averages and copies of weights that a module writes itself follow a cut, wherever its code writes them."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_prune import FilterL1Pruning, Linear, PruningError, TaylorFilterPruning, prune_filters
from tests.runs import IMAGE, Net, fit, net

HOOKS = ("on_train_batch_start", "on_before_zero_grad", "on_train_batch_end")


def pairs(module):
    return zip(module.network.parameters(), module.average.parameters(), strict=True)


def in_place(module):
    for own, average in pairs(module):
        average.data.mul_(0.9).add_(own.data, alpha=0.1)


def by_data(module):
    for own, average in pairs(module):
        average.data = average.data * 0.9 + own.data * 0.1


def by_lerp(module):
    with torch.no_grad():
        for own, average in pairs(module):
            average.lerp_(own, 0.1)


def by_lists(module):
    with torch.no_grad():
        torch._foreach_mul_(list(module.average.parameters()), 0.9)
        torch._foreach_add_(list(module.average.parameters()), list(module.network.parameters()), alpha=0.1)


def by_state_dict(module):
    if module.global_step % 2 == 0:
        module.average.load_state_dict(module.network.state_dict())


def by_copy(module):
    for own, average in pairs(module):
        average.data.copy_(own)


def by_torch(module):
    module.average.update_parameters(module.network)


WAYS = (in_place, by_data, by_lerp, by_lists, by_state_dict, by_copy, by_torch)


class Averaging(Net):
    """Holds a network and an average of it, which it writes somewhere in a training batch; nothing learns."""

    def __init__(self, write, where, used=True):
        super().__init__(dropout=0.0)
        for name in ("first", "norm", "second", "hidden", "drop", "head"):
            delattr(self, name)
        self.network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3))
        if write is by_torch:
            self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        else:
            self.average = copy.deepcopy(self.network)
        self.average.requires_grad_(False)
        self.write, self.used, self.logged = write, used, 0.0
        if where != "training_step":
            setattr(type(self), where, lambda self, *args: self.write_late(where))

    def write_late(self, where):
        self.write(self)
        if where == "on_train_batch_end":  # when the step is only tried, nothing is logged
            self.logged = self.trainer.callback_metrics["step_loss"]

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("step_loss", loss)
        if self.used:
            loss = loss + 0.1 * (self(batch[0]) - self.average(batch[0])).square().mean()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), 0.0)


def averaging(write, where, **arguments):
    """Build a module of a class of its own, which gets the hook."""
    return net(lambda: type("Averaging", (Averaging,), {})(write, where, **arguments)).train()


def pruning(**arguments):
    return FilterL1Pruning(0.5, schedule=Linear(1, 2), report=False, **arguments)


def of(average):
    return average.module if isinstance(average, AveragedModel) else average


@pytest.mark.parametrize("used", [True, False], ids=["used", "only kept"])
@pytest.mark.parametrize("where", ["training_step", *HOOKS])
@pytest.mark.parametrize("write", WAYS)
def test_averages_lose_the_units_of_what_they_average(write, where, used):
    """Where nothing learns, an average equals the network, unit by unit, after each cut as before."""
    module = averaging(write, where, used=used)
    if where == "training_step":
        step = type(module).training_step
        type(module).training_step = lambda self, *args: (self.write(self), step(self, *args))[1]
    fit(module, pruning(trace="training_step"))
    assert [part.out_channels for part in module.network if isinstance(part, nn.Conv2d)] == [4, 3]
    for own, average in zip(module.network.parameters(), of(module.average).parameters(), strict=True):
        torch.testing.assert_close(average.detach(), own.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*never ran")
@pytest.mark.parametrize("kind", [pruning, lambda: TaylorFilterPruning(0.5, schedule=Linear(1, 2), report=False)])
@pytest.mark.parametrize("where", HOOKS)
def test_hooks_that_would_fail_are_refused_before_training(kind, where):
    """What forward does not show, a hook of the module does, though it also reads what no step has logged yet."""
    module = averaging(in_place, where)
    with pytest.raises(PruningError, match=r"hooks of the module .*RuntimeError.* Use trace='training_step'"):
        fit(module, kind())
    assert module.trainer.global_step == 0


def test_a_frozen_teacher_of_the_same_shape_stays_dense():
    """What training only reads is no average, though it has the layers of what learns."""
    module = averaging(lambda module: None, "on_train_batch_end")
    fit(module, FilterL1Pruning(0.3, schedule=Linear(1, 2), report=False, trace="training_step"))
    assert module.network[0].out_channels == 5 and module.average[0].out_channels == 8


class Stepping(Net):
    """Steps its schedule in a hook, and counts."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.calls = 0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.calls += 1
        assert outputs["loss"] is not None and not outputs["loss"].requires_grad
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "epoch", "frequency": 1000}]


@pytest.mark.parametrize("trace", ["forward", "training_step"])
def test_trying_hooks_changes_nothing(trace):
    """Schedules, counts and attributes are those of the batches that were trained on."""
    module = net(Stepping)
    fit(module, pruning(trace=trace))
    assert module.calls == 12
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**12)


class Momentum(nn.Module):
    """Writes the average of its encoder in its own forward, in train mode."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Linear(24, 24)

    def forward(self, images):
        if self.training:
            for own, average in zip(self.encoder.parameters(), self.average.parameters(), strict=True):
                average.data.mul_(0.9).add_(own.data, alpha=0.1)
        return (self.head(self.encoder(images)) * self.average(images)).sum(1)


def test_averages_written_by_forward_follow():
    """Without a Trainer, too, an average loses the units of its encoder."""
    model = net(Momentum).train()
    prune_filters(model, IMAGE, 0.5, progress=False)
    assert (model.encoder[0].out_channels, model.encoder[2].out_channels) == (4, 3)
    for own, average in zip(model.encoder.parameters(), model.average.parameters(), strict=True):
        assert torch.equal(own, average)
