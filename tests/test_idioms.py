"""Ways in which libraries of models write sizes and positions into their code: what is named there follows a cut."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.filters import prune_filters
from tests.models import IMAGE, SEQUENCE, MixedTokens
from tests.silencing import silence_


class PartedHeads(nn.Module):
    """Shares its width among five heads, two of which go through one layer and three through another."""

    def __init__(self):
        super().__init__()
        self.heads, self.parts = 5, [6, 9]
        self.enter, self.value, self.proj, self.out = (
            nn.Linear(*size) for size in ((6, 15), (15, 15), (15, 15), (15, 2))
        )
        self.first, self.second = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.Conv1d(9, 9, 3, padding=1, groups=9)

    def forward(self, x):
        x = self.enter(x)
        batch, tokens, width = x.shape
        heads = self.value(x).reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
        mixed = heads @ (heads.transpose(-1, -2) @ heads)  # by head
        first, second = mixed.transpose(-1, -2).reshape(batch, -1, tokens).split(self.parts, 1)
        mixed = torch.cat([self.first(first), self.second(second)], 1).transpose(1, 2)
        return self.out(x + self.proj(mixed.reshape(batch, tokens, width)))


class Mixed(nn.Module):
    """Mixes tokens by a depthwise convolution behind heads that share their channels."""

    def __init__(self, heads, width, per_channel, kernel):
        super().__init__()
        self.heads, self.width = heads, width
        size = heads * width
        self.value = nn.Linear(6, size)
        self.mix = nn.Conv1d(size, size * per_channel, kernel, padding=kernel // 2, groups=size)
        self.norm = nn.BatchNorm1d(size * per_channel)
        self.out = nn.Linear(size * per_channel, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        heads = self.value(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        mixed = heads @ (heads.transpose(-1, -2) @ heads)
        mixed = mixed.transpose(-1, -2).reshape(batch, -1, tokens)
        return self.out(torch.relu(self.norm(self.mix(mixed))).transpose(1, 2))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("per_channel", [1, 2])
@pytest.mark.parametrize(("heads", "width", "amount"), [(3, 4, 0.25), (2, 6, 0.5), (5, 3, 1 / 3), (1, 8, 0.5)])
def test_depthwise_convolutions_follow_the_channels_of_heads(heads, width, amount, per_channel, kernel):
    """Whichever way heads shrink, each filter leaves with the channel that it reads."""
    model = Mixed(heads, width, per_channel, kernel).double().eval()
    full = copy.deepcopy(model)
    report = prune_filters(model, SEQUENCE, amount)
    assert model.value.out_features < heads * width
    silence_(full, report.kept, shared=("mix.weight",))
    other = torch.randn_like(SEQUENCE)
    torch.testing.assert_close(model(other), full(other))


def test_where_no_whole_head_can_leave_each_head_shrinks():
    """Parts of two and of three heads share no fraction, so every head, and the stream, loses a third of its width."""
    model = PartedHeads().double()
    full = copy.deepcopy(model)
    report = prune_filters(model, SEQUENCE, 1 / 3)
    silence_(full, report.kept, shared=("first.weight", "second.weight"))
    other = torch.randn_like(SEQUENCE)
    torch.testing.assert_close(model(other), full(other))
    assert (model.enter.out_features, model.value.out_features, model.heads) == (10, 10, 5)
    assert (model.parts, model.first.groups, model.second.groups) == ([4, 6], 4, 6)
    assert model(SEQUENCE).shape == (2, 5, 2) and {pin.tensor for pin in report.pinned} == {"out.weight"}


@pytest.mark.parametrize(
    "settings", [{"kernel": 3, "padding": 1}, {"kernel": 1, "stride": 2, "padding": 4}], ids=["wide", "strided"]
)
def test_positions_that_stand_beside_each_other_stay(settings):
    """Where a kernel or stride makes one position depend on its neighbours, or skips some, all stay."""
    with pytest.raises(PruningError, match="enter.weight: positions of a convolution"):
        prune_filters(MixedTokens(**settings).double(), SEQUENCE, 0.4)


class Standardised(nn.Conv2d):
    """Standardises its weight over all that each filter reads, by a normalisation meant for batches."""

    def __init__(self, channels, filters):
        super().__init__(channels, filters, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(filters, 1, 1, 1))

    def forward(self, x):
        rows, gain = self.weight.reshape(1, self.out_channels, -1), self.gain.view(-1)
        return self._conv_forward(
            x, F.batch_norm(rows, None, None, gain, training=True).view_as(self.weight), self.bias
        )


def test_standardised_weights_lose_filters_and_channels():
    """Where weights are standardised, filters leave, and what the next layer standardises over becomes less."""
    model = nn.Sequential(Standardised(3, 8), nn.ReLU(), Standardised(8, 6), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    prune_filters(model, IMAGE, 0.5)
    assert (model[0].weight.shape, model[2].weight.shape, model[2].gain.shape[0]) == ((4, 3, 3, 3), (3, 4, 3, 3), 3)
    assert model(IMAGE).shape == (2, 2, 8, 8)


class ScaledHeads(nn.Module):
    """Attention whose queries are scaled within each head by what another layer makes of the input."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 6
        self.enter, self.gain, self.out = nn.Linear(6, 24), nn.Linear(6, 6), nn.Linear(24, 2)

    def forward(self, x):
        heads = self.enter(x).reshape(*x.shape[:2], self.heads, self.width)
        scaled = (heads * self.gain(x).unsqueeze(2)).transpose(1, 2)
        heads = heads.transpose(1, 2)
        mixed = (scaled @ heads.transpose(-1, -2)).softmax(-1) @ heads
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_what_stands_beside_the_width_of_whole_heads_stays():
    """Where whole heads leave, what scales within each of them stays, and is told to before any cut is tried."""
    model = ScaledHeads().double()
    report = prune_filters(model, SEQUENCE, 0.5)
    assert (model.heads, model.width, model.enter.out_features, model.gain.out_features) == (2, 6, 12, 6)
    assert any(pin.tensor == "gain.weight" and pin.reason.startswith("tied to") for pin in report.pinned)


class Context(nn.Module):
    """Takes one channel apart as a score, and the others as two equal halves whose width it keeps."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.enter, self.out = nn.Linear(6, 17), nn.Linear(8, 2)

    def forward(self, x):
        score, key, value = self.enter(x).split([1, self.width, self.width], -1)
        return self.out((score.softmax(1) * key).sum(1, keepdim=True) * value.relu())


def test_a_piece_of_fixed_size_stays_beside_others_that_follow():
    """Where code takes a piece of so many channels and others of a width that it keeps, the others alone shrink."""
    model = Context().double()
    prune_filters(model, SEQUENCE, 0.5)
    assert (model.width, model.enter.out_features, model.out.in_features) == (4, 9, 4)
