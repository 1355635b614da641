"""Widths go by channels, and what is tied together or weighs much does not carry a plan far beyond what is asked."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_prune import PruningError, prune_filters

TOKENS = torch.randn(2, 3, 1)


class Stream(nn.Module):
    """Transformer layers on one residual stream: its width, and so all heads, shrink together; the rest is free."""

    def __init__(self, heads, head_width, inner):
        super().__init__()
        width = heads * head_width
        self.enter = nn.Linear(1, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, n, batch_first=True) for n in inner)
        self.leave = nn.Linear(width, 1)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)

    @property
    def widths(self):
        return self.enter.out_features, [layer.linear1.out_features for layer in self.layers]


class Heads(nn.Module):
    """Attention whose heads leave one by one, between inputs and outputs that stay, beside a free layer."""

    def __init__(self, heads, head_width, inner):
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.q, self.k, self.v = (nn.Linear(6, heads * head_width) for _ in range(3))
        self.o = nn.Linear(heads * head_width, 6)
        self.up, self.down = nn.Linear(6, inner), nn.Linear(inner, 6)

    def forward(self, x):
        q, k, v = (
            part(x).view(*x.shape[:2], self.heads, self.head_width).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(mixed) + self.down(self.up(x).relu())


def parameters_of(width, inner):
    """Count the parameters of a stream: attention, two linear layers and two norms a layer, and what is around."""
    layers = (4 * width * width + 4 * width + 2 * width * n + n + width + 4 * width for n in inner)
    return 2 * width + width + 1 + sum(layers)


def wholes(full, step, least):
    """List the widths that a limit lets a layer have: multiples of a step, not below the least, and what it is."""
    return [n for n in range(step, full, step) if n >= least] + [full]


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(2, 6),
    head_width=st.integers(1, 6),
    inner=st.lists(st.integers(2, 24), min_size=1, max_size=2),
    amount=st.floats(0.01, 0.9),
    round_to=st.integers(1, 8),
    min_width=st.integers(1, 8),
    scope=st.sampled_from(["layer", "global"]),
)
def test_streams_lose_what_is_asked_and_little_more(heads, head_width, inner, amount, round_to, min_width, scope):
    """What leaves is at least what is asked, by one step more only where no widths are nearer."""
    torch.manual_seed(0)
    model = Stream(heads, head_width, inner)
    width = heads * head_width
    streams = [n for n in wholes(width, math.lcm(head_width, round_to), min_width) if n % head_width == 0]
    inners = [wholes(n, round_to, min_width) for n in inner]
    allowed = (1 - amount) * parameters_of(width, inner)
    possible = [parameters_of(n, ns) for n in streams for ns in product(*inners)]
    arguments = {"round_to": round_to, "min_width": min_width, "scope": scope, "target": "params", "progress": False}
    assume(len(streams) > 1 or any(len(ns) > 1 for ns in inners))
    if min(possible) > allowed * (1 + 1e-9):
        with pytest.raises(PruningError, match="cannot go"):
            prune_filters(model, TOKENS, amount, **arguments)
        return
    prune_filters(model, TOKENS, amount, **arguments)
    slim, slims = model.widths
    assert slim in streams
    assert all(n in ns for n, ns in zip(slims, inners, strict=True))
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == parameters_of(slim, slims)
    assert left <= allowed * (1 + 1e-9)
    # one step of a free layer, the heaviest: what a plan may go too far by
    step = max((after - before for ns in inners for before, after in pairwise(ns)), default=0)
    nearest = max(cost for cost in possible if cost <= allowed * (1 + 1e-9))
    assert nearest - left < max(1, step * (2 * width + 1))


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(2, 6),
    head_width=st.integers(1, 8),
    inner=st.integers(2, 24),
    amount=st.floats(0.05, 0.8),
    limits=st.tuples(st.integers(1, 8), st.integers(1, 12), st.floats(0.3, 1.0)),
    whole_model=st.booleans(),
)
def test_limits_speak_of_channels(heads, head_width, inner, amount, limits, whole_model):
    """Rounding, least widths and largest shares hold for heads times their width as for any other layer's channels."""
    torch.manual_seed(0)
    model, (round_to, min_width, max_amount) = Heads(heads, head_width, inner), limits
    target = "params" if whole_model else "filters"
    try:
        prune_filters(
            model, torch.randn(2, 3, 6), amount, round_to=round_to, min_width=min_width, max_amount=max_amount,
            target=target, progress=False,
        )  # fmt: skip
    except PruningError:  # beyond what can go: see above
        return
    for layer, whole, unit in ((model.q, heads * head_width, head_width), (model.up, inner, 1)):
        left = layer.out_features
        least = max(min_width, whole - math.floor(max_amount * whole + 1e-9))
        assert left == whole or (left % round_to == 0 and left % unit == 0 and left >= least)
        if target == "filters":  # the widest of those that lose what is asked, or the narrowest that there is
            wanted = whole - unit * math.ceil(amount * whole / unit - 1e-9)
            allowed = [n for n in wholes(whole, math.lcm(unit, round_to), least) if n >= wanted]
            assert left == min(allowed)


@pytest.mark.parametrize("round_to", [1, 2, 4, 8, 12, 16, 64])
def test_rounding_by_a_heads_width_cuts_heads(round_to):
    """Eight heads of 16 channels lose half, or as near to that as the rounding allows; none of them is overlooked."""
    model = Heads(8, 16, 64)
    prune_filters(model, torch.randn(2, 3, 6), 0.5, round_to=round_to, progress=False)
    assert model.q.out_features == (96 if round_to == 12 else 64)
    assert model.up.out_features == (36 if round_to == 12 else 64 if round_to == 64 else 32)


@pytest.mark.parametrize(("heads", "amount", "width"), [(4, 0.3, 24), (4, 0.5, 16), (3, 0.3, 16), (2, 0.3, 32)])
def test_layers_make_up_for_shares_that_linked_groups_cannot_keep(heads, amount, width):
    """Where none of the shares that a stream can keep is the one asked for, it keeps more and other layers less."""
    full = 24 if heads == 3 else 32
    model = Stream(heads, full // heads, [64, 64])
    report = prune_filters(model, TOKENS, amount, progress=False)
    assert model.enter.out_features == width
    gone = sum(group.before - group.after for group in report.groups)
    asked = amount * sum(group.before for group in report.groups)
    assert asked <= gone < asked + len(report.groups)
