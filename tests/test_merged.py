"""Dimensions merged into one meet each other part by part: channels with channels, positions with positions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.pruning.filters import prune_filters
from tests.models import SEQUENCE
from tests.silencing import silence_

# Ways to sum over the pairs of a channel and a basis function, of (batch, tokens, channels, functions) with
# (out, channels, functions).
SUMS = {
    "einsum": lambda basis, weight: torch.einsum("btik,oik->bto", basis, weight),
    "matmul": lambda basis, weight: basis.flatten(-2) @ weight.flatten(-2).t(),
    "linear": lambda basis, weight: F.linear(basis.flatten(-2), weight.flatten(1)),
    "tensordot": lambda basis, weight: torch.tensordot(basis, weight, dims=([2, 3], [1, 2])),
    "other order": lambda basis, weight: F.linear(basis.transpose(-1, -2).flatten(-2), weight.mT.flatten(1)),
    "gated": lambda basis, weight: F.linear(
        basis.flatten(-2) * basis.flatten(-2).sigmoid() + basis.exp().flatten(-2), weight.flatten(1)
    ),
}


class Splines(nn.Module):
    """Reads each channel through basis functions, as Kolmogorov-Arnold networks do."""

    def __init__(self, summed, learned):
        super().__init__()
        self.summed = SUMS[summed]
        self.enter = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(2, 8, 5))
        centers = torch.linspace(-1, 1, 5)
        if learned:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)

    def forward(self, x):
        basis = torch.exp(-((torch.tanh(self.enter(x))[..., None] - self.centers) ** 2))
        return self.summed(basis, self.weight)


class Ensemble(nn.Module):
    """Runs members beside each other and adds up what they return."""

    def __init__(self, members, shared_bias):
        super().__init__()
        self.enter = nn.Parameter(torch.randn(members, 6, 8))
        self.bias = nn.Parameter(torch.randn(1 if shared_bias else members, 8))
        self.leave = nn.Parameter(torch.randn(members, 8, 2))

    def forward(self, x):
        hidden = torch.relu(torch.einsum("bti,eih->bteh", x, self.enter) + self.bias)
        return torch.einsum("bteh,eho->bto", hidden, self.leave)


def _pruned_right(model, amount):
    """Prune, and check the output on other inputs against the full model with what left silenced."""
    model = model.double()
    full = copy.deepcopy(model)
    report = prune_filters(model, SEQUENCE, amount)
    silence_(full, report.kept)
    other = torch.randn_like(SEQUENCE)
    torch.testing.assert_close(model(other), full(other))
    return model


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("summed", SUMS)
def test_channels_that_are_read_through_basis_functions_leave(summed, learned):
    """Channels leave with all their basis functions."""
    torch.manual_seed(0)
    model = _pruned_right(Splines(summed, learned), 0.5)
    assert model.enter.out_features == 4
    assert model.weight.shape[1] == 4


@pytest.mark.parametrize("shared_bias", [True, False])
def test_members_of_an_ensemble_lose_hidden_units(shared_bias):
    """Each member loses the same hidden units, and whole members leave where the amount asks for it."""
    torch.manual_seed(0)
    model = _pruned_right(Ensemble(4, shared_bias), 0.5)
    assert (model.enter.shape, model.leave.shape) == ((2, 6, 4), (2, 4, 2))
