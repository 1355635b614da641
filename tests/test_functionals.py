"""Counts and shapes that code gives to functions: they follow what is kept where they are held, or hold it back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune import prune_filters
from tests.silencing import assert_equal_to_rounding, silenced

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Middle(nn.Module):
    """What stands between two convolutions; other numbers of the same value lie beside the one that is read."""

    def __init__(self, width: int, groups: int, kind: str):
        super().__init__()
        self.n_layers, self.groups, self.dim, self.kind = groups, groups, width, kind
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.kernel = nn.Parameter(torch.randn(width, width // groups if kind.startswith("conv") else 1, 3, 3))

    def forward(self, x):
        last = x.permute(0, 2, 3, 1)
        if self.kind == "group_norm":
            return F.group_norm(x, self.groups, self.weight, self.bias)
        if self.kind == "group_norm by name":
            return F.group_norm(x, weight=self.weight, num_groups=self.groups)
        if self.kind == "layer_norm":
            return F.layer_norm(last, (self.dim,), self.weight).permute(0, 3, 1, 2)
        if self.kind == "rms_norm":
            return F.rms_norm(last, (self.dim,), self.weight).permute(0, 3, 1, 2)
        if self.kind == "conv by groups":
            return F.conv2d(x, self.kernel, padding=1, groups=self.groups)
        if self.kind == "conv by literal groups":
            return F.conv2d(x, self.kernel, None, 1, 1, 1, 4)
        if self.kind == "depthwise":
            return F.conv2d(x, self.kernel, padding=1, groups=self.dim)
        return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


def network(kind: str, width: int = 16, groups: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 1), Middle(width, groups, kind), nn.Conv2d(width, 2, 1)).double().eval()


@pytest.mark.parametrize(
    ("kind", "groups", "dim"),
    [("group_norm", 2, 16), ("group_norm by name", 2, 16), ("layer_norm", 4, 8), ("rms_norm", 4, 8),
     ("conv by groups", 2, 16), ("conv by literal groups", 4, 16), ("depthwise", 4, 8), ("depthwise of a size", 4, 16)],
)  # fmt: skip
def test_the_number_that_was_read_follows(kind, groups, dim):
    """The slim network is one built with the numbers it holds now; no other attribute of that value changes."""
    torch.manual_seed(0)
    model = network(kind)
    full = network(kind)
    full.load_state_dict(model.state_dict())
    report = prune_filters(model, IMAGES, amount={"0": 0.5}, progress=False)
    middle = model[1]
    assert model[0].out_channels == 8, report.pinned
    assert (middle.groups, middle.dim, middle.n_layers) == (groups, dim, 4)
    if kind in ("depthwise", "depthwise of a size", "conv by groups"):
        assert_equal_to_rounding(model(IMAGES), silenced(full, report.kept)(IMAGES))
    kept = report.kept["0.weight"][0]
    assert torch.equal(model[0].weight, full[0].weight[kept])
    if kind == "layer_norm":
        y = F.layer_norm(full[0](IMAGES)[:, kept].permute(0, 2, 3, 1), (8,), full[1].weight[kept]).permute(0, 3, 1, 2)
        assert_equal_to_rounding(model(IMAGES), F.conv2d(y, full[2].weight[:, kept], full[2].bias), 1e-11)
    if kind == "group_norm":
        affine = full[1].weight[kept], full[1].bias[kept]
        assert set((kept // 4).bincount(minlength=4).tolist()) == {0, 4}  # whole groups
        y = F.group_norm(full[0](IMAGES)[:, kept], 2, *affine)
        assert_equal_to_rounding(model(IMAGES), F.conv2d(y, full[2].weight[:, kept], full[2].bias), 1e-11)


class Seeds(nn.Module):
    """A picture from a vector, whose channels are a number of some type."""

    def __init__(self, channels):
        super().__init__()
        self.enter, self.leave, self.channels = nn.Linear(6, 128), nn.ConvTranspose2d(8, 3, 2), channels

    def forward(self, x):
        return self.leave(self.enter(x).relu().view(x.shape[0], self.channels, 4, 4))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32])
def test_numbers_keep_their_type(kind, tmp_path):
    """A whole number of numpy follows like one of Python, stays one, and is a plain one in checkpoints."""
    model, x = Seeds(kind(8)), torch.randn(2, 6)
    prune_filters(model, x, amount=0.5, progress=False)
    assert model.channels == 4 and type(model.channels) is kind and model(x).shape == (2, 3, 5, 5)
    torch.save(model.state_dict(), tmp_path / "slim.pt")
    torch.load(tmp_path / "slim.pt", weights_only=True)


def test_shapes_of_torch_follow():
    """``nn.Unflatten`` may hold a ``torch.Size``, and still does."""
    model = nn.Sequential(nn.Linear(6, 128), nn.Unflatten(1, torch.Size([8, 4, 4])), nn.Conv2d(8, 3, 1))
    prune_filters(model, torch.randn(2, 6), amount=0.5, progress=False)
    assert model[1].unflattened_size == torch.Size([4, 4, 4]) and isinstance(model[1].unflattened_size, torch.Size)


@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm,
     nn.utils.parametrizations.spectral_norm],
    ids=["weight_norm of old", "weight_norm", "spectral_norm of old", "spectral_norm"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_normalised_weights_shrink(norm):
    """Channels of convolutions whose weights are normalised leave, with their entries of the vectors that norm them."""
    layers = [norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 24, 3)), nn.ReLU(), norm(nn.Conv2d(24, 4, 3))]
    model = nn.Sequential(*layers).double()
    model(IMAGES)
    prune_filters(model.eval(), IMAGES, amount=0.5, progress=False, target="filters")
    assert [layer.out_channels for layer in layers[::2]] == [8, 12, 4]
    assert [layer.in_channels for layer in layers[::2]] == [3, 8, 12]
    model.train()(IMAGES).sum().backward()


class PerSample(nn.Module):
    """Every image is convolved with a kernel of its own: a grouped convolution, a group an image."""

    def __init__(self):
        super().__init__()
        self.a, self.g, self.o = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 4), nn.Conv2d(8, 4, 1)
        self.k, self.n_in, self.n_out = nn.Parameter(torch.randn(4, 8, 12, 1, 1) * 0.3), 12, 8

    def forward(self, x):
        y = F.relu(self.a(x))
        batch, channels, height, width = y.shape
        mixed = self.g(y.mean((2, 3))).tanh() @ self.k.view(4, -1)
        kernels = mixed.view(batch * self.n_out, self.n_in, 1, 1)
        y = F.conv2d(y.reshape(1, batch * channels, height, width), kernels, groups=batch)
        return self.o(y.view(batch, self.n_out, height, width))


@pytest.mark.parametrize("images", [1, 2, 3])
def test_kernels_made_by_data_shrink(images):
    """However many images the example has, all of their kernels lose the same channels."""
    torch.manual_seed(0)
    model, full, x = PerSample().double(), PerSample().double(), torch.randn(images, 3, 8, 8, dtype=torch.float64)
    full.load_state_dict(model.state_dict())
    report = prune_filters(model, x, amount={"a": 0.5}, progress=False)
    assert model.a.out_channels == 6 and model.n_in == 6, report.pinned
    gone = sorted(set(range(12)) - set(report.kept["a.weight"][0].tolist()))
    full.a.weight.data[gone] = full.a.bias.data[gone] = 0
    assert_equal_to_rounding(model(x), full(x))
