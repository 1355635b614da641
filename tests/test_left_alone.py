"""Networks that a training does not change: teachers, networks of metrics and averaged copies are left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    IterativeMagnitudePruning,
    OBSOneShot,
    TaylorFilterPruning,
    prune_filters,
    prune_weights,
)
from lightning_prune.pruning.left_alone import left_alone
from tests.runs import IMAGE, Net, fit, net


class Perceptual(torchmetrics.Metric):
    """A metric with a network of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.add_state("total", torch.tensor(0.0), "sum")

    def update(self, images):
        self.total += self.net(images).square().mean()

    def compute(self):
        return self.total


def teacher():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )


class Student(Net):
    """Learns from a frozen teacher beside it, and carries a metric and an average."""

    def __init__(self):
        super().__init__()
        self.teacher = teacher().requires_grad_(False)
        self.metric = Perceptual()
        self.average = AveragedModel(teacher())

    def training_step(self, batch, batch_idx):
        images = batch[0]
        aside = self.metric.net(images).mean() + self.average(images).mean()
        return F.mse_loss(self(images), self.teacher(images)) + 0 * aside


ASIDE = ("teacher", "metric", "average")
CALLBACKS = {
    "magnitude": lambda **more: IterativeMagnitudePruning(0.5, **more),
    "global": lambda **more: IterativeMagnitudePruning(0.5, scope="global", **more),
    "obs": lambda **more: OBSOneShot(0.5, batches=2, **more),
    "l1": lambda **more: FilterL1Pruning(0.5, trace="training_step", **more),
    "criterion": lambda **more: FilterPruning(0.5, criterion="l2", trace="training_step", **more),
    "taylor": lambda **more: TaylorFilterPruning(0.5, trace="training_step", **more),
}


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_networks_aside_are_left_alone(make, caplog):
    """Neither weights nor filters of a teacher, a metric or an average go; half of what is trained does."""
    module = net(Student)
    before = {name: copy.deepcopy(getattr(module, name).state_dict()) for name in ASIDE[:2]}
    with caplog.at_level("INFO"):
        fit(module, make(), max_epochs=2)
    for name, state in before.items():
        after = getattr(module, name).state_dict()
        assert all(torch.equal(after[key], value) for key, value in state.items() if "net" in key or name == "teacher")
    assert all(bool(weight.all()) for weight in module.average.parameters())
    pruned = module.first.out_channels == 4 or int((module.first.weight == 0).sum()) > 0
    assert pruned and all(f"{name} is left alone" in caplog.text for name in ASIDE)


def test_named_networks_are_pruned():
    """A frozen teacher that a pattern, an amount or the module itself names is pruned."""
    for make in (
        lambda module: IterativeMagnitudePruning(parameters=["teacher"]),
        lambda module: IterativeMagnitudePruning({module.teacher: 0.5}),
        lambda module: IterativeMagnitudePruning({"teacher.*": 0.5}),
    ):
        module = net(Student)
        fit(module, make(module), max_epochs=1)
        assert int((module.teacher[0].weight == 0).sum()) == 8 * 2 * 9 // 2
        assert bool(module.first.weight.all())
    module = net(Student)
    fit(module, FilterL1Pruning({"teacher.0": 0.5}, trace="training_step"), max_epochs=1)
    assert (module.teacher[0].out_channels, module.first.out_channels) == (4, 8)


def test_what_counts_as_frozen():
    """A frozen backbone is left alone beside a head that trains; nothing is where nothing trains, or for one layer."""
    model = nn.Sequential(teacher().requires_grad_(False), nn.Linear(3, 3))
    assert list(left_alone(model)) == ["0"]
    assert not left_alone(model, ["0.2"]) and list(left_alone(model, ["*"])) == ["0"]
    assert not left_alone(model.requires_grad_(False))
    layers = teacher()
    layers[0].requires_grad_(False)
    assert not left_alone(layers)
    shared = nn.ModuleDict({"metric": Perceptual(), "head": nn.Linear(2, 2)})
    assert list(left_alone(shared)) == ["metric"]
    shared["net"] = shared["metric"].net
    assert not left_alone(shared)


def test_functions_leave_frozen_networks_alone_beside_others():
    """Plain functions prune a model that is frozen as a whole, and frozen parts of others where they are named."""
    model = teacher().requires_grad_(False)
    prune_filters(model, IMAGE, 0.5)
    assert model[0].out_channels == 4
    both = nn.ModuleDict({"one": teacher().requires_grad_(False), "two": teacher()})
    report = prune_weights(both, 0.5)
    assert both["one"][0].weight.count_nonzero() == 8 * 2 * 9 and "frozen" in str(report.pinned)
    assert int((both["two"][0].weight == 0).sum()) == 8 * 2 * 9 // 2
    prune_weights(both, {"one.*": 0.5})
    assert int((both["one"][0].weight == 0).sum()) == 8 * 2 * 9 // 2


class Compiled(nn.Module):
    """Holds a part that TorchScript compiled between two that it did not."""

    def __init__(self, compiled):
        super().__init__()
        part = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.enter = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12))
        self.part = torch.jit.script(part) if compiled == "script" else torch.jit.trace(part, torch.randn(2, 12))
        self.leave = nn.Linear(12, 2)

    def forward(self, x):
        return self.leave(self.part(self.enter(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", ["script", "trace"])
def test_what_torchscript_compiled_stays_and_the_rest_is_pruned(compiled):
    """The tensors of a compiled part cannot be exchanged, so their channels stay, and those of other layers leave."""
    model = Compiled(compiled)
    report = prune_filters(model, torch.randn(3, 6), 0.5)
    assert (model.enter[0].out_features, model.enter[2].out_features, model.leave.in_features) == (4, 12, 12)
    assert any("held by TorchScript (torch.jit.script or torch.jit.trace)" in pin.reason for pin in report.pinned)
    assert model(torch.randn(5, 6)).shape == (5, 2)
