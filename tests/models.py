"""Tiny networks that carry their own expected numbers: channel groups, what stays and why, parameters and FLOPs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.model.calls import ExampleInputs


@dataclass(frozen=True)
class Net:
    """How to build a network, and what must be found in it.

    Attributes:
        build: Makes the module.
        inputs: Example inputs.
        groups: Name of each channel group -> its width.
        stays: Parameter whose channels stay, all or some -> words of the reason.
        refused: Names of the groups that no cut can be proved of.
        linked: Names of the groups that keep the same share.
        flops: Multiply-adds, worked out by hand.
        params: Number of parameters, worked out by hand.
        exact: Whether outputs of the cut network equal those of the full one with the gone channels silenced.
        consumers: Bare parameters that are summed over -> the dimension.
    """

    build: Callable[[], nn.Module]
    inputs: ExampleInputs
    groups: dict[str, int]
    stays: dict[str, str] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    linked: tuple[str, ...] = ()
    flops: int | None = None
    params: int | None = None
    exact: bool = True
    consumers: dict[str, int] = field(default_factory=dict)


NETS: dict[str, Net] = {}
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def net(inputs: ExampleInputs, groups: dict[str, int], **expected: Any) -> Callable[[Callable], Callable]:
    """Enter a module class, or a function that makes a module, under its name."""

    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETS[build.__name__] = Net(build, inputs, groups, **expected)
        return build

    return enter


# Plain chains


@net(
    IMAGE,
    {"0": 4, "3": 6},
    flops=2 * (64 * 3 * 4 * 9 + 2 * 64 * 4 + 64 * 4 * 6 * 9 + 6 * 64 + 5 * 6),
    params=112 + 8 + 222 + 35,
)
def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@net(ROWS, {"0": 8, "3": 7}, flops=2 * (6 * 8 + 2 * 8 + 8 * 7 + 7 * 2), params=56 + 16 + 63 + 16)
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 2)
    )


@net(IMAGE, {"0": 4}, flops=2 * (36 * 3 * 4 * 9 + 4 * 36 * 5), params=112 + 725)
def flatten() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@net(IMAGE, {"0": 4, "3": 6})
def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, dilation=2), nn.PReLU(4), nn.MaxPool2d(2, padding=1),
        nn.Conv2d(4, 6, 2, padding=1, padding_mode="reflect"), nn.Upsample(scale_factor=2), nn.Conv2d(6, 1, 1),
    )  # fmt: skip


@net(IMAGE, {"0": 4, "1": 5})
def circular() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), nn.Conv2d(5, 1, 1))


# Streams that several layers write on


@net(IMAGE, {"stem": 4, "conv1": 5, "conv2": 6}, flops=2 * 64 * (3 * 4 + 4 * 5 + 5 * 6 + 4 * 6) + 2 * (6 * 64 + 12))
class Projection(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.conv1, self.conv2, self.shortcut = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1), nn.Conv2d(4, 6, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.conv2(self.conv1(x).relu()) + self.shortcut(x)
        return self.fc(self.pool(x.relu()).flatten(1))


@net(IMAGE, {"stem": 4, "conv1": 5}, stays={"conv2.weight": "entries beside them are padding"})
class Padded(nn.Module):
    """An option-A shortcut: the four channels of the stem meet the middle four of eight, and zeros pin the others."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 8, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.conv2(self.conv1(x).relu()) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.fc(x.relu().mean((2, 3)))


@net(IMAGE, {"stem": 4, "convs.0": 3, "convs.1": 5, "convs.2": 2})
class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, widths, growths = nn.Conv2d(3, 4, 1), (4, 7, 12), (3, 5, 2)
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        self.convs = nn.ModuleList(nn.Conv2d(c, g, 3, padding=1) for c, g in zip(widths, growths, strict=True))
        self.fc = nn.Linear(14, 2)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.fc(x.mean((2, 3)))


@net(IMAGE, {"conv": 6})
class Shared(nn.Module):
    """One convolution runs twice, so what enters it and what leaves it are one group."""

    def __init__(self):
        super().__init__()
        self.conv, self.again, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        x = self.conv(x)
        return self.fc(self.again(self.again(x).relu()).mean((2, 3)))


# Groups, depth and shuffles


@net(
    IMAGE,
    {"0": 4, "3": 6},
    flops=2 * 64 * (3 * 4 + 4 * 9 + 2 * 4 + 4 * 6) + 2 * (6 * 64 + 12),
    params=16 + 40 + 8 + 30 + 14,
)
def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


@net(IMAGE, {"0": 4, "1": 5})
def grouped() -> nn.Module:
    """Two groups of four channels in, of five out: the number of groups stays, each shrinks alike."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(10, 2),
    )  # fmt: skip


@net(IMAGE, {"0": 8, "4": 3})
def many_groups() -> nn.Module:
    """Eight groups of two channels, as in ResNeXt: whole groups leave, and `groups` follows."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=8), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip


@net(IMAGE, {"0": 6, "1": 4, "2": 5})
def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(4, 5, 1), nn.ConvTranspose2d(5, 5, 2, groups=5),
        nn.Conv2d(5, 1, 1),
    )  # fmt: skip


@net(IMAGE, {"0": 4, "1": 3})
def transposed_groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 1, 1),
    )  # fmt: skip


class ChannelShuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


@net(IMAGE, {"0": 4, "2": 5})
def shuffle() -> nn.Module:
    """Of eight channels, one in each half leaves at a time."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), ChannelShuffle(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 1))


@net(IMAGE, {"0": 3, "2": 4})
def pixel_shuffle() -> nn.Module:
    """Twelve channels become three images of twice the size: four leave at a time."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(4), nn.Conv2d(64, 1, 1),
    )  # fmt: skip


# Gates


class Gate(nn.Module):
    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self.sizes = sizes

    def forward(self, x):
        first, second = x.chunk(2, 1) if not self.sizes else x.split(list(self.sizes), 1)
        return first * second.sigmoid() if not self.sizes else torch.cat([second, first.exp()], 1)


@net(IMAGE, {"0": 4})
def chunk() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), Gate(()), nn.Conv2d(4, 1, 1))


@net(IMAGE, {"0": 9, "2": 4})
def unequal_split() -> nn.Module:
    """Sizes that a module holds follow."""
    return nn.Sequential(nn.Conv2d(3, 9, 1), Gate((3, 6)), nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))


class LiteralGate(nn.Module):
    def forward(self, x):
        first, second = x.split([3, 6], 1)
        return torch.cat([second, first.exp()], 1)


@net(IMAGE, {"0": 3, "2": 4}, stays={"0.weight": "does not run"}, refused=frozenset({"0"}))
def literal_split() -> nn.Module:
    """Sizes written into the code cannot follow, so the channels stay."""
    return nn.Sequential(nn.Conv2d(3, 9, 1), LiteralGate(), nn.Conv2d(9, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))


@net(ROWS, {"0": 5})
def glu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.GLU(), nn.Linear(5, 2))


@net(IMAGE, {"conv": 6, "down": 3})
class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.out(x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid())


# Between rows and images


@net(ROWS, {"fc": 3, "conv": 4})
class Decoder(nn.Module):
    """Forty-eight features become three images of 4 x 4: sixteen leave at a time."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.out = nn.Linear(6, 48), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.out(self.conv(self.fc(x).view(len(x), -1, 4, 4)).relu())


@net(ROWS, {"fc": 3, "conv": 4}, stays={"fc.weight": "does not run"}, refused=frozenset({"fc"}))
class FrozenDecoder(nn.Module):
    """The three images are written into the code."""

    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.out = nn.Linear(6, 48), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.out(self.conv(self.fc(x).view(-1, 3, 4, 4)).relu())


# Tied, bare and frozen parameters, buffers


@net(ROWS, {"enter": 6})
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.first, self.second, self.out = (nn.Linear(6, n) for n in (6, 6, 6, 2))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(self.second(self.first(self.enter(x).relu()).relu()))


@net(TOKENS, {"back": 8, "fc": 6}, flops=6 * (8 * 6 + 6 * 8 + 8 * 10), params=80 + 54 + 56)
class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.back = nn.Embedding(10, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.back(self.fc(x).relu()))


@net(ROWS, {"a": 5, "b": 7}, consumers={"b": 1, "c": 1}, flops=2 * (30 + 35 + 14), params=30 + 5 + 35 + 14)
class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.b, self.c = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(2, 7))

    def forward(self, x):
        return F.linear(F.linear(F.linear(x, self.a, self.bias).relu(), self.b).relu(), self.c)


@net(IMAGE, {"kernel": 5}, consumers={"second": 1}, flops=2 * (36 * 27 * 5 + 36 * 5 * 2))
class BareConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.second = nn.Parameter(torch.randn(5, 3, 3, 3)), nn.Parameter(torch.randn(2, 5, 1, 1))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.kernel).relu(), self.second)


@net(ROWS, {"0": 5})
def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return model


@net(ROWS, {"used": 5})
class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.out = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(self.used(x))


@net(ROWS, {"used": 5})
class Buffers(nn.Module):
    """A buffer with one entry per channel follows; one of another size stays."""

    def __init__(self):
        super().__init__()
        self.used, self.out = nn.Linear(6, 5), nn.Linear(5, 2)
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("other", torch.rand(3))
        self.register_buffer("passing", torch.rand(5), persistent=False)

    def forward(self, x):
        return self.out(self.used(x) * self.scale + self.passing) + self.other.sum()


@net(ROWS, {"0.parametrizations.weight.original1": 5})
def parametrized() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2))


@net((ROWS, ROWS + 1), {"left": 5, "right": 4, "both": 3})
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 4)
        self.both, self.out = nn.Bilinear(5, 4, 3), nn.Linear(3, 2)

    def forward(self, x, y):
        return self.out(self.both(self.left(x).relu(), self.right(y)).relu())


# Normalisation


@net(IMAGE, {"0": 6})
def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6, affine=True),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.PReLU(6), nn.Conv2d(6, 1, 1),
    )  # fmt: skip


@net(IMAGE, {"0": 6}, exact=False)
def group_norm() -> nn.Module:
    """Six groups of two channels: whole groups leave, and `num_groups` follows."""
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(6, 12), nn.ReLU(), nn.Conv2d(12, 1, 1))


@net(IMAGE, {"0": 6}, exact=False)
def few_groups() -> nn.Module:
    """Two groups of six channels: each loses the same share."""
    return nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(2, 12), nn.ReLU(), nn.Conv2d(12, 1, 1))


@net(SEQUENCE, {"0": 8, "3": 7}, exact=False)
def layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 7), nn.RMSNorm(7), nn.SiLU(), nn.Linear(7, 2)
    )


@net(SEQUENCE, {"fc": 8}, exact=False)
class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc(x)
        return self.out(F.layer_norm(x, x.shape[-1:]))


@net(SEQUENCE, {"enter": 9})
class MixedTokens(nn.Module):
    """Mixes tokens by a convolution whose positions are channels: with a kernel of one, those may leave."""

    def __init__(self, kernel=1, **settings):
        super().__init__()
        self.enter, self.mix, self.out = nn.Linear(6, 9), nn.Conv1d(5, 4, kernel, **settings), nn.Linear(9, 2)

    def forward(self, x):
        return self.out(self.mix(self.enter(x)).relu())


# What has numbers written into its code, or no rule


@net(
    SEQUENCE, {"enter": 8, "attention.in_proj_weight": 2, "fc1": 9}, exact=False,
    linked=("enter", "attention.in_proj_weight"),
)  # fmt: skip
class Attention(nn.Module):
    """`MultiheadAttention` ties its heads to the width of its inputs: both shrink alike."""

    def __init__(self):
        super().__init__()
        self.enter, self.attention, self.norm = (
            nn.Linear(6, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
        )
        self.fc1, self.fc2, self.out = nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.enter(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x + self.fc2(self.fc1(x).relu()))


@net(SEQUENCE, {"enter": 5, "lstm.weight_ih_l0": 4, "fc": 7})
class Recurrent(nn.Module):
    """`LSTM` has one hidden size: the units of all layers and directions at one index leave together."""

    def __init__(self):
        super().__init__()
        self.enter, self.lstm = nn.Linear(6, 5), nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.fc, self.out = nn.Linear(8, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.out(self.fc(self.lstm(self.enter(x))[0][:, -1]).relu())


@torch.library.custom_op("lightning_prune_tests::half_turn", mutates_args=())
def half_turn(x: Tensor) -> Tensor:
    """An operator that nobody taught a rule, and that deals out entries anew."""
    return x.flip(-1)


@half_turn.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class HalfTurn(nn.Module):
    def forward(self, x):
        return half_turn(x)


@torch.library.custom_op("lightning_prune_tests::negated", mutates_args=())
def negated(x: Tensor) -> Tensor:
    """An operator that nobody taught a rule, and that works entry by entry."""
    return -x


@negated.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Negated(nn.Module):
    def forward(self, x):
        return negated(x)


@net(ROWS, {"0": 5, "1": 4})
def unknown_operator_entry_by_entry() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), Negated(), nn.Linear(4, 2))


@net(ROWS, {"0": 5}, stays={"1.weight": "lightning_prune_tests.half_turn"})
def unknown_operator() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), HalfTurn(), nn.Linear(4, 2))


# What goes in and comes out


@dataclass
class Prediction:
    logits: Tensor
    hidden: Tensor


class Outputs(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.fc1, self.fc2, self.out, self.kind = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2), kind

    def forward(self, x):
        hidden = self.fc2(self.fc1(x).relu())
        return self.kind(logits=self.out(hidden.relu()), hidden=hidden)


@net(ROWS, {"fc1": 5}, stays={"fc2.weight": "reaches the model's output"})
def dict_output() -> nn.Module:
    return Outputs(dict)


@net(ROWS, {"fc1": 5}, stays={"fc2.weight": "reaches the model's output"})
def dataclass_output() -> nn.Module:
    return Outputs(Prediction)


@net({"rows": ROWS, "image": IMAGE, "scale": 2.0}, {"fc": 5, "conv": 4})
class DictInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.out = nn.Linear(6, 5), nn.Conv2d(3, 4, 1), nn.Linear(9, 2)

    def forward(self, *, rows, image, scale):
        return self.out(torch.cat([self.fc(rows) * scale, self.conv(image).amax((2, 3))], 1))


@net(ROWS, {"fc": 5})
class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.fc(x)
        for _ in range(3 if x.sum().item() > -math.inf else 1):
            x = x.relu() if x.mean() > 0 else x.tanh()
        return self.out(x)


@net(ROWS, {"fc": 5})
class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out, self.cache, self.calls = nn.Linear(6, 5), nn.Linear(5, 2), None, 0

    def forward(self, x):
        self.cache, self.calls = self.fc(x), self.calls + 1
        return self.out(self.cache)


# Other numbers than float64


def _in(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 2)).to(dtype), ROWS.to(dtype)


def with_nan() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    model[0].weight.data[1, 2] = math.nan
    return model
