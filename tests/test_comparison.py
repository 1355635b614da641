"""The comparison of pruned networks with full ones in the benchmarks: right prunings pass, planted errors do not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.comparison import compare, with_ordinary_sizes_
from benchmarks.zoo import randomised
from lightning_prune import prune_filters


class Network(nn.Module):
    """Convolutions with norms, a hidden LayerScale, and an output that shows nothing."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), norm(16), nn.Conv2d(16, 8, 3)
        self.mix, self.scale = nn.Conv2d(8, 8, 1), nn.Parameter(torch.full((8, 1, 1), 1e-6))

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu())
        return (x + self.scale * self.mix(x)).amax((2, 3)).argmax(-1)


INPUTS = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def pruned(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    full = randomised(Network(norm)).double()
    slim = copy.deepcopy(full)
    return full, slim, prune_filters(slim, INPUTS, amount=0.3, ignore=("second", "mix")).kept


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity, lambda width: nn.GroupNorm(1, width)])
def test_a_right_pruning_is_equal_everywhere(norm):
    """Every module's output of a rightly pruned network is made of the full one's, across a norm's statistic, too."""
    found = compare(*pruned(norm), INPUTS)
    assert not found.wrong and not found.skipped and not found.scaled and found.equal == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda slim: slim.first.weight.data.copy_(slim.first.weight.data.roll(1, 0)),
        lambda slim: slim.second.weight.data.copy_(slim.second.weight.data.roll(1, 1)),
        lambda slim: slim.norm.bias.data.copy_(slim.norm.bias.data.flip(0)),
        lambda slim: slim.norm.running_mean.copy_(slim.norm.running_mean.flip(0)),
        lambda slim: slim.first.bias.data[:2].copy_(slim.first.bias.data[:2].flip(0)),
        lambda slim: slim.mix.weight.data.mul_(1 + 1e-3),
    ],
)
def test_a_planted_error_is_found_though_the_output_is_an_index(spoil):
    """An error in one tensor is found at a module, even if the network returns integers alone."""
    full, slim, kept = pruned()
    spoil(slim)
    found = compare(full, slim, kept, INPUTS)
    assert found.wrong or found.scaled


class Interleaved(nn.Module):
    """Shuffles two halves of the channels, in an order that no list of kept indices names."""

    def forward(self, x):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def test_a_small_channel_is_not_taken_for_a_pruned_one():
    """Where channels are shuffled, one with small values is found behind a pruned one, whose values are zero."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(4, 8), Interleaved(), nn.Linear(8, 2)).double()
    full[0].weight.data[5] *= 5e-5
    full[0].bias.data[5] *= 5e-5
    kept, read = torch.tensor([0, 2, 3, 5, 6, 7]), torch.tensor([0, 3, 4, 5, 6, 7])
    slim = copy.deepcopy(full)
    slim[0].weight.data, slim[0].bias.data = full[0].weight.data[kept], full[0].bias.data[kept]
    slim[2].weight.data = full[2].weight.data[:, read]
    names = {"0.weight": {0: kept}, "0.bias": {0: kept}}  # what reads them has an order of its own, and reads zeros
    found = compare(full, slim, names, torch.randn(3, 4).double())
    assert not found.wrong and found.equal == 4


class PiecewiseNorm(nn.Module):
    """A group norm of one's own whose number of groups is a literal."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.second = nn.Linear(6, 16), Grouped(), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(self.inner(self.first(x)))


class Grouped(nn.Module):
    def forward(self, x):
        return F.group_norm(x, 4)


def test_groups_read_at_the_wrong_width_are_found():
    """A literal number of groups that once read other channels gives other outputs."""
    torch.manual_seed(0)
    full = PiecewiseNorm().double()
    slim = copy.deepcopy(full)
    kept = torch.arange(8)  # two whole groups of four, read as four of two
    slim.first.weight.data, slim.first.bias.data = slim.first.weight.data[kept], slim.first.bias.data[kept]
    slim.second.weight.data = slim.second.weight.data[:, kept]
    names = {"first.weight": {0: kept}, "first.bias": {0: kept}, "second.weight": {1: kept}}
    found = compare(full, slim, names, torch.randn(2, 6).double())
    assert set(found.wrong) >= {"inner", "second"} and "first" not in found.wrong


def test_a_factor_is_named_but_not_for_the_whole_network():
    """Outputs inside that differ by one factor are named as scaled; those of the network itself are wrong."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    inner, outer = copy.deepcopy(full), copy.deepcopy(full)
    inner[0].weight.data *= 2.0
    inner[0].bias.data *= 2.0
    inner[2].weight.data /= 2.0
    outer[2].weight.data *= 2.0
    outer[2].bias.data *= 2.0
    x = torch.randn(3, 4).double()
    found = compare(copy.deepcopy(full), inner, {}, x)
    assert not found.wrong and found.scaled == {"0": pytest.approx(2.0), "1": pytest.approx(2.0)}
    assert "the model" in compare(full, outer, {}, x).wrong


def test_some_channels_may_be_scaled_by_one_factor():
    """Of a projection that lost units, some may be scaled by one factor, as queries are beside keys, not by several."""
    torch.manual_seed(0)
    full = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    kept = torch.tensor([0, 2, 3, 5])
    names = {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {1: kept}}
    for factors, wrong in (([2.0, 2.0, 1.0, 1.0], False), ([2.0, 3.0, 1.0, 1.0], True), ([-1.0, 1.0, 1.0, 1.0], True)):
        slim, scale = copy.deepcopy(full), torch.tensor(factors).double()
        slim[0].weight.data = full[0].weight.data[kept] * scale[:, None]
        slim[0].bias.data = full[0].bias.data[kept] * scale
        slim[1].weight.data = full[1].weight.data[:, kept] / scale
        found = compare(copy.deepcopy(full), slim, names, torch.randn(3, 4).double())
        assert bool(found.wrong) is wrong and ("0" in found.scaled) is not wrong


def test_parameters_near_zero_get_ordinary_sizes():
    """A LayerScale near zero, a zero gate and a zero matrix no longer hide what is behind them."""
    model = with_ordinary_sizes_(Network())
    scale = model.scale.detach()
    assert float(scale.min()) >= 0.5 and float(scale.max()) <= 1.5
    zero = nn.Linear(5, 5)
    nn.init.zeros_(zero.weight)
    assert float(with_ordinary_sizes_(zero).weight.detach().std()) > 0.1
