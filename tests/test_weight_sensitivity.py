"""Sensitivity of single weights: each weight alone loses shares of its entries, and gets them back."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_prune import IterativeMagnitudePruning, PruningError, prune_weights
from lightning_prune.analysis.sensitivity_findings import Sensitivity
from lightning_prune.analysis.weight_sensitivity import weight_sensitivity
from lightning_prune.callbacks.validation import trainer_weight_sensitivity
from tests.runs import batches, fit, net, trainer


def model_and_metric():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(20, 6)

    def evaluate(net):
        return float(net(inputs).square().mean())

    return model, evaluate


def test_each_value_is_that_of_the_pruned_model():
    """The metric at each share is that of a copy of which this weight alone has lost as much by ``prune_weights``."""
    model, evaluate = model_and_metric()
    found = weight_sensitivity(model, evaluate, shares=(0.3, 0.6, 0.9), progress=False)
    assert [(group.name, group.width) for group in found.groups] == [("0.weight", 48), ("3.weight", 24)]
    for group in found.groups:
        assert group.shares == tuple(math.ceil(share * group.width) / group.width for share in (0.3, 0.6, 0.9))
        for share, value in zip(group.shares, group.values, strict=True):
            other = copy.deepcopy(model).eval()
            prune_weights(other, {group.name: share})
            assert value == evaluate(other)
    assert found.dense == evaluate(model.eval())


def test_the_model_is_left_as_found():
    """Values, gradients, mode and identity of parameters are as before, also when the metric fails on the way."""
    model, evaluate = model_and_metric()
    model(torch.randn(4, 6)).sum().backward()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    parameters, calls = list(model.parameters()), []

    def fails(net):
        calls.append(net)
        return evaluate(net) if len(calls) < 3 else 1 / 0

    weight_sensitivity(model, evaluate, shares=(0.5,), progress=False)
    with pytest.raises(ZeroDivisionError):
        weight_sensitivity(model, fails, shares=(0.5, 0.7), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.training and not model._state_dict_hooks


def test_amounts_are_rates_for_each_layer():
    """What each weight may lose alone is an ``amount`` by name that pruning takes, from plain PyTorch or in a run."""
    module = net(dropout=0.0)

    def evaluate(model):
        return 1 - 0.1 * int((model.head.weight == 0).any()) - 0.5 * int((model.second.weight == 0).sum() > 200)

    found = weight_sensitivity(module, evaluate, shares=(0.2, 0.4, 0.6), progress=False)
    amounts = found.amounts(drop=0.2)
    assert amounts == pytest.approx({"first.weight": 87 / 144, "second.weight": 173 / 432, "hidden.weight": 0.6,
                                     "head.weight": 0.6})  # fmt: skip
    assert "head.weight" not in found.amounts(drop=0.05)
    fit(module, IterativeMagnitudePruning(amounts, scope="global"))
    assert int((module.second.weight == 0).sum()) == 173


def test_goes_on_from_what_was_done(tmp_path):
    """A stopped analysis goes on from its file, and one of other weights is refused."""
    model, evaluate = model_and_metric()
    whole = weight_sensitivity(model, evaluate, progress=False)
    weight_sensitivity(model, evaluate, path=tmp_path / "found.json", progress=False)
    done = Sensitivity.from_json(tmp_path / "found.json")
    assert done == whole
    calls = []

    def counted(net):
        calls.append(net)
        return evaluate(net)

    assert weight_sensitivity(model, counted, done=done, progress=False) == whole
    assert len(calls) == 1
    prune_weights(model, 0.5, scope="global")
    with pytest.raises(PruningError, match="weight_sensitivity: what is done|sensitivity: what is done"):
        weight_sensitivity(model, evaluate, done=done, progress=False)


def test_by_the_trainer():
    """With a Trainer the metric is what validation logs; lower losses are better."""
    module = net()
    made = trainer()
    found = trainer_weight_sensitivity(made, module, batches(), metric="val_loss", shares=(0.5,), progress=False)
    assert found.mode == "min" and len(found.groups) == 4
    other = copy.deepcopy(module)
    prune_weights(other, {"second": 0.5})
    (validated,) = trainer().validate(other, batches(), verbose=False)
    assert found.groups[1].values == pytest.approx((validated["val_loss"],))
