"""prune_fisher: weights leave by the loss's own curvature, and their neighbours make up for them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import PruningError, prune_weights
from lightning_prune.algorithms.solvers.brain_surgeon import surgeon
from lightning_prune.pruning.fisher import prune_fisher


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=2, features=12):
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = [torch.randn(100, features, generator=generator, dtype=torch.float64) @ mix for _ in range(count)]
    rule = torch.randn(features, 3, generator=generator, dtype=torch.float64)
    return [(x, (x @ rule + torch.randn(100, 3, generator=generator)).argmax(dim=1)) for x in inputs]


def trained(model, data):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        total = sum(loss(model, batch) for batch in data) / len(data)
        total.backward()
        return total

    optimizer.step(closure)
    return model


def test_one_block_is_pruned_as_by_the_surgeon():
    """Where a block holds a whole layer, its weights leave and move as by OBS on the gradients' outer products."""
    data = batches()
    model = trained(nn.Linear(12, 3, bias=False).double(), data)
    weights, rows = model.weight.detach().flatten().clone(), []
    for x, y in data:
        for i in range(len(x)):
            (gradient,) = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])), [model.weight])
            rows.append(gradient.flatten())
    fisher = torch.stack(rows).T @ torch.stack(rows) / len(rows)
    fisher += 0.01 * fisher.diagonal().mean() * torch.eye(36, dtype=torch.float64)
    report = prune_fisher(model, batches=data, loss=loss, amount=0.25, block=36)
    left, moved, predicted = list(range(36)), weights, 0.0
    for _ in range(9):
        step = surgeon(moved, torch.linalg.inv(fisher[left][:, left]))
        moved = torch.cat([step.weights[: step.which], step.weights[step.which + 1 :]])
        del left[step.which]
        predicted += step.rise
    assert report.kept["weight"].flatten().nonzero()[:, 0].tolist() == left
    torch.testing.assert_close(model.weight.detach().flatten()[left], moved)
    assert report.details.predicted == pytest.approx(predicted, rel=1e-6)


def test_the_loss_rises_less_than_by_magnitude():
    """Of a trained network, half of the weights are gone, rounded up, and its loss rises less than by magnitude."""
    data = batches()
    dense = trained(nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double(), data)
    surgical, small = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_fisher(surgical, batches=data, loss=loss, amount=0.5, block=20)
    prune_weights(small, 0.5, scope="global")
    assert sum(int((model.weight == 0).sum()) for model in (surgical[0], surgical[2])) == 53  # of 105
    assert all(torch.equal(surgical.get_parameter(name) != 0, mask) for name, mask in report.kept.items())
    risen = [sum(float(loss(model, batch).detach()) for batch in data) for model in (dense, surgical, small)]
    assert risen[1] - risen[0] < 0.8 * (risen[2] - risen[0])


def test_what_is_ignored_stays():
    """Weights that ignore= names are left to the last bit, as is everything that is no weight of a layer."""
    data = batches()
    model = nn.Sequential(nn.Linear(12, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    before = copy.deepcopy(model.state_dict())
    prune_fisher(model, batches=data, loss=loss, amount=0.5, ignore=["2"])
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == {
        "0.weight"
    }


@pytest.mark.parametrize(
    "asked", [{"amount": 1.0}, {"damping": -1.0}, {"block": 0}, {"amount": {"weight": 0.5}}], ids=str
)
def test_bad_arguments_are_refused(asked):
    """Arguments out of range, or of another kind, are refused by name."""
    with pytest.raises((ValueError, TypeError), match=r"prune_fisher\(" + next(iter(asked))):
        prune_fisher(nn.Linear(12, 3).double(), batches=batches(), loss=loss, **asked)


def test_no_data_is_refused():
    """Without examples there is no curvature."""
    with pytest.raises(PruningError, match="no batch came"):
        prune_fisher(nn.Linear(12, 3).double(), batches=[], loss=loss)
