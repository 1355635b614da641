"""Code whose operators turn on chance, on numbers, on the size of an image or on how tensors lie in memory is cut."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import prune_filters
from tests.silencing import assert_equal_to_rounding, silenced


class Routed(nn.Module):
    """A mixture of experts: each example goes to the expert that a router, behind a norm, likes best."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.first(x))
        gate, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for which in chosen.unique().tolist():
            rows = (chosen == which).nonzero().squeeze(1)
            out = out.index_add(0, rows, self.experts[which](x[rows]) * gate[rows, None])
        return self.last(x + out)


class Skipping(nn.Module):
    """Skips layers at random in train mode, by the generator named."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            if not (self.training and self.drawn() < 0.5):
                x = x + layer(x).relu()
        return self.last(x)

    def drawn(self):
        return {"torch": lambda: torch.rand([]), "numpy": np.random.rand, "python": random.random}[self.generator]()


class Masking(nn.Module):
    """Puts a learnt vector in place of positions that numpy draws in train mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.unknown = nn.Parameter(torch.randn(16))

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x[torch.from_numpy(np.random.rand(*x.shape[:2]) < 0.5)] = self.unknown
        return self.last(x.relu())


class MixedByConvolution(nn.Module):
    """A feed-forward layer with a depthwise convolution over positions: a batch of one lies otherwise in memory."""

    def __init__(self):
        super().__init__()
        self.first, self.depthwise = nn.Linear(6, 64), nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.last = nn.Linear(64, 3)

    def forward(self, x):
        n, _, h, w = x.shape
        x = self.first(x.flatten(2).transpose(1, 2))
        x = self.depthwise(x.transpose(1, 2).view(n, -1, h, w)).flatten(2).transpose(1, 2)
        scale = 1.0 if self.training else 0.5
        return self.last(nn.functional.gelu(x)) * scale


class Windows(nn.Module):
    """Attention in windows of an image, whose products count windows and heads together."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.patches, self.qkv = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 3 * width)
        self.proj, self.pool, self.last = nn.Linear(width, width), nn.AdaptiveAvgPool1d(1), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        n, h, w, _ = x.shape
        x = x.view(n, h // 8, 8, w // 8, 8, -1).transpose(2, 3).reshape(n * (h // 8) * (w // 8), 64, -1)
        q, k, v = (t.view(len(x), 64, -1, self.head_width).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.proj(y).view(n, -1, y.shape[1], self.proj.out_features).flatten(1, 2)
        return self.last(self.pool(y.transpose(1, 2)).flatten(1))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CODE = {
    "skipping by torch": (lambda: Skipping("torch"), (4, 6)),
    "skipping by numpy": (lambda: Skipping("numpy"), (4, 6)),
    "skipping by python": (lambda: Skipping("python"), (4, 6)),
    "masking": (Masking, (2, 9, 6)),
    "mixed by a convolution": (MixedByConvolution, (1, 6, 12, 12)),
    "windows": (Windows, (1, 3, 128, 128)),
}


@pytest.mark.parametrize("name", CODE)
def test_removing_is_silencing(name):
    """A third of the channels leave, and the slim network computes what the full one does without them."""
    torch.manual_seed(0)
    build, shape = CODE[name]
    model, inputs = build().double().eval(), rows(*shape)
    full = copy.deepcopy(model)
    report = prune_filters(model, inputs, 0.3)
    assert report.params_after <= 0.75 * report.params_before
    with torch.no_grad():
        assert_equal_to_rounding(model(inputs), silenced(full, report.kept)(inputs))


def test_experts_are_cut_whichever_the_slim_model_chooses():
    """A norm over fewer channels changes which expert an example goes to, rightly, and refuses no cut."""
    for seed in range(5):
        torch.manual_seed(seed)
        report = prune_filters(Routed().eval(), torch.randn(12, 6), 0.5)
        assert report.params_after <= 0.5 * report.params_before


def test_generators_are_left_as_found():
    """What Python, numpy and torch draw next is what they would have drawn."""

    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for generator in ("torch", "numpy", "python"):
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        expected = drawn()
        model = Skipping(generator)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        prune_filters(model, rows(4, 6).float(), 0.3)
        assert drawn() == expected


class Checking(nn.Module):
    """Refuses any width of its first layer but one, just before an ordinary layer runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.third, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        if x.shape[-1] != 16:
            raise ValueError(f"expected 16 channels, got {x.shape[-1]}")
        return self.last(self.third(self.second(x).relu()).relu())


def test_what_one_layer_refuses_is_not_held_against_others_of_its_class():
    """Only blocks that the user wrote repeat; a Linear elsewhere has nothing to do with one that cannot shrink."""
    model = Checking()
    prune_filters(model, torch.randn(2, 6), 0.5)
    assert (model.first.out_features, model.third.out_features) == (16, 8)
