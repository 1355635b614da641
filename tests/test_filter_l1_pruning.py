"""FilterL1Pruning in real runs: what leaves, and when."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import Cubic, FilterL1Pruning, Linear, OneShot, count_flops
from tests.runs import (
    IMAGE,
    WIDTHS,
    Depthwise,
    Known,
    Net,
    Watch,
    assert_agrees_with_shapes,
    assert_same_weights,
    fit,
    images,
    net,
    trainer,
    weights,
    widths,
)


def lowest(norms, count):
    """The indices that stay when the ``count`` smallest norms leave."""
    return sorted(range(len(norms)), key=lambda i: float(norms[i]))[count:]


class Still(Known):
    """Learns at rate 0."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


# What leaves


def test_smallest_filters_leave():
    """In each layer the filters with the smallest sum of absolute weights leave; those that stay keep their values."""
    module = net(Still)
    before = weights(module)
    fit(module, FilterL1Pruning(amount=0.5), max_epochs=1)
    stay = {
        name: sorted(lowest(before[f"{name}.weight"].abs().flatten(1).sum(1), n // 2)) for name, n in WIDTHS.items()
    }
    assert torch.equal(module.first.weight, before["first.weight"][stay["first"]])
    assert torch.equal(module.norm.weight, before["norm.weight"][stay["first"]])
    assert torch.equal(module.second.weight, before["second.weight"][stay["second"]][:, stay["first"]])
    assert torch.equal(module.second.bias, before["second.bias"][stay["second"]])
    assert torch.equal(module.hidden.weight, before["hidden.weight"][stay["hidden"]][:, stay["second"]])
    assert torch.equal(module.head.weight, before["head.weight"][:, stay["hidden"]])
    assert torch.equal(module.head.bias, before["head.bias"])


def test_global_scope_compares_layers():
    """With ``scope="global"`` the norms, divided by their layer's mean, are compared across layers."""
    module = net(Still)
    relative = {}
    for name in WIDTHS:
        norms = module.get_submodule(name).weight.detach().abs().flatten(1).sum(1)
        relative |= {(name, i): float(norm / norms.mean()) for i, norm in enumerate(norms)}
    left = sorted(relative, key=relative.get)[12:]
    fit(module, FilterL1Pruning(amount=0.5, scope="global"), max_epochs=1)
    assert widths(module) == {name: sum(layer == name for layer, _ in left) for name in WIDTHS}


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", [Net, Depthwise])
def test_budget_is_reached(target, scope, kind):
    """With a target of parameters or FLOPs, training ends at the budget or just below it, as counted."""
    module = net(kind)
    dense = {"params": sum(p.numel() for p in module.parameters()), "flops": count_flops(module, IMAGE).total}
    fit(module, FilterL1Pruning(amount=0.5, target=target, scope=scope, schedule=Cubic(0, 2)))
    left = {"params": sum(p.numel() for p in module.parameters()), "flops": count_flops(module, IMAGE).total}
    assert 0.3 < left[target] / dense[target] <= 0.5
    assert_agrees_with_shapes(module)


def test_amounts_by_pattern():
    """Amounts by pattern hold for the layers they name; the others stay whole."""
    module = net()
    fit(module, FilterL1Pruning(amount={"first": 0.75, "hid*": 0.5}, schedule=Linear(0, 2)))
    assert widths(module) == {"first": 2, "second": 6, "hidden": 5}


def test_ignored_layers_stay():
    """Layers named in ``ignore`` keep all their filters."""
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, ignore=["sec*", "hidden"]))
    assert widths(module) == {"first": 4, "second": 6, "hidden": 10}


def test_widths_are_rounded():
    """With ``round_to`` widths after every cut are multiples of it, and no less is kept than asked."""
    watch = Watch()
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, round_to=4, schedule=Linear(0, 2)), watch)
    assert watch.widths[-1] == widths(module) == {"first": 4, "second": 4, "hidden": 8}
    assert all(width % 4 == 0 or width == WIDTHS[name] for seen in watch.widths for name, width in seen.items())


def test_tied_weights_stay_tied():
    """Parameters that were one stay one."""

    class Tied(Net):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.back = nn.Linear(10, 6, bias=False)
            self.again = nn.Linear(10, 6, bias=False)
            self.again.weight = self.back.weight

        def forward(self, images):
            x = F.relu(self.second(F.relu(self.norm(self.first(images))))).mean(dim=(2, 3))
            hidden = F.relu(self.hidden(x))
            return self.head(F.relu(self.hidden(self.back(hidden) + self.again(hidden))))

    module = net(Tied)
    fit(module, FilterL1Pruning(amount=0.5))
    assert module.again.weight is module.back.weight
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_weights_are_the_same_each_time():
    """Two runs from one seed end at the same weights."""
    one, two = net(), net()
    for module in (one, two):
        fit(module, FilterL1Pruning(amount=0.5, target="flops", scope="global", schedule=Cubic(0, 2)))
    assert_same_weights(one, weights(two))


# When


@pytest.mark.parametrize("kind", [Net, Known], ids=["first-batch", "example_input_array"])
@pytest.mark.parametrize(
    "schedule, first",
    [
        (None, [4, 4, 4, 4, 4]),
        (OneShot(2), [8, 8, 4, 4, 4]),
        (Linear(1, 4), [8, 7, 6, 5, 4]),
        (Linear(0, 3, every=2), [6, 6, 5, 4, 4]),
        (Cubic(0, 2), [5, 4, 4, 4, 4]),
    ],
    ids=str,
)
def test_schedule_sets_the_moment(schedule, first, kind):
    """What is due at an epoch has left before its first batch, of 8 filters half."""
    watch = Watch()
    fit(net(kind), FilterL1Pruning(amount=0.5, schedule=schedule), watch, max_epochs=5)
    assert [seen["first"] for seen in watch.widths] == first


def test_max_steps():
    """A run that is bounded by steps is pruned by epochs, too."""
    module = net()
    fit(module, FilterL1Pruning(amount=0.5, schedule=Linear(0, 2)), max_epochs=-1, max_steps=9)
    assert widths(module) == {"first": 4, "second": 3, "hidden": 5}


def test_endless_data():
    """A loader without a length works."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images())

    module = net()
    made = trainer(FilterL1Pruning(amount=0.5, schedule=Linear(0, 1)), max_steps=10, max_epochs=-1)
    made.fit(module, DataLoader(Endless(), 8))
    assert widths(module)["first"] == 4
