"""Random architectures for property tests: stages of random widths, each from a family that a cut must follow."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

INPUTS = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Stage:
    """One stage: a name in STAGES and its numbers; ``repr`` of a list of stages is a whole architecture."""

    kind: str
    width: int  # of what the stage makes, in units of `parts`
    parts: int = 1
    norm: str = "none"


class Residual(nn.Module):
    def __init__(self, c: int, width: int, inner: int, norm: str):
        super().__init__()
        self.conv1, self.norm1 = conv(c, inner), NORMS[norm](inner)
        self.conv2 = conv(inner, width)
        self.shortcut = nn.Identity() if c == width else nn.Conv2d(c, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.norm1(self.conv1(x)).relu()) + self.shortcut(x)).relu()


class Dense(nn.Module):
    def __init__(self, c: int, growth: int, layers: int, norm: str):
        super().__init__()
        self.norms = nn.ModuleList(NORMS[norm](c + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(conv(c + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(norm(x).relu())], dim=1)
        return x


class ChunkGate(nn.Module):
    def __init__(self, c: int, width: int, pieces: int):
        super().__init__()
        self.conv, self.pieces = conv(c, width * pieces), pieces

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.conv(x).chunk(self.pieces, dim=1)
        for other in others:
            first = first * other.sigmoid()
        return first


class SplitGate(nn.Module):
    def __init__(self, c: int, width: int):
        super().__init__()
        self.conv, self.sizes = conv(c, 3 * width), [width, 2 * width]
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).split(self.sizes, dim=1)
        return left * self.narrow(right).sigmoid()


class Shuffle(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).flatten(1, 2)


class Squeeze(nn.Module):
    def __init__(self, c: int, width: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(c, width, 1), nn.Conv2d(width, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Twice(nn.Module):
    def __init__(self, c: int, norm: str):
        super().__init__()
        self.conv, self.norm = conv(c, c), NORMS[norm](c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x)).relu()))


class Head(nn.Module):
    def __init__(self, c: int, flat: bool):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2 if flat else 1)
        self.fc1, self.fc2 = nn.Linear(c * (4 if flat else 1), 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.pool(x).flatten(1)).relu())


def conv(c: int, width: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, width, 3, padding=1, groups=groups)


def dividing(c: int) -> int:
    return next(groups for groups in (4, 3, 2, 1) if c % groups == 0)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda c: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "prelu": lambda c: nn.PReLU(c),
    "group": lambda c: nn.GroupNorm(dividing(c), c),
    "layer": lambda c: nn.GroupNorm(1, c),
}
EXACT = ("none", "batch", "instance", "prelu")
"""Norms whose numbers for one channel do not hang on other channels."""

# kind -> (channels in, stage) -> (module, channels out)
STAGES: dict[str, Callable[[int, Stage], tuple[nn.Module, int]]] = {
    "conv": lambda c, s: (nn.Sequential(conv(c, s.width), NORMS[s.norm](s.width), nn.ReLU()), s.width),
    "residual": lambda c, s: (Residual(c, c, s.width, s.norm), c),
    "projection": lambda c, s: (Residual(c, s.width, s.width + 2, s.norm), s.width),
    "dense": lambda c, s: (Dense(c, s.width, s.parts, s.norm), c + s.width * s.parts),
    "chunk": lambda c, s: (ChunkGate(c, s.width, s.parts), s.width),
    "split": lambda c, s: (SplitGate(c, s.width), s.width),
    "glu": lambda c, s: (nn.Sequential(conv(c, 2 * s.width), nn.GLU(1)), s.width),
    "depthwise": lambda c, s: (nn.Sequential(conv(c, c, c), NORMS[s.norm](c), nn.Conv2d(c, s.width, 1)), s.width),
    "multiplied": lambda c, s: (nn.Conv2d(c, c * s.parts, 3, padding=1, groups=c), c * s.parts),
    "grouped": lambda c, s: (
        nn.Sequential(conv(c, s.width * s.parts), nn.ReLU(), conv(s.width * s.parts, 2 * s.width * s.parts, s.parts)),
        2 * s.width * s.parts,
    ),
    "shuffled": lambda c, s: (
        nn.Sequential(
            conv(c, s.width * s.parts), Shuffle(s.parts), conv(s.width * s.parts, s.width * s.parts, s.parts)
        ),
        s.width * s.parts,
    ),
    "shuffle": lambda c, s: (Shuffle(dividing(c)), c),
    "up": lambda c, s: (nn.Sequential(nn.AvgPool2d(2), nn.ConvTranspose2d(c, s.width, 2, stride=2)), s.width),
    "up depthwise": lambda c, s: (nn.Sequential(nn.AvgPool2d(2), nn.ConvTranspose2d(c, c, 2, stride=2, groups=c)), c),
    "up grouped": lambda c, s: (
        nn.Sequential(nn.AvgPool2d(2), nn.ConvTranspose2d(c, s.width * dividing(c), 2, stride=2, groups=dividing(c))),
        s.width * dividing(c),
    ),
    "pixel shuffle": lambda c, s: (
        nn.Sequential(nn.MaxPool2d(2), conv(c, 4 * s.width), nn.PixelShuffle(2)),
        s.width,
    ),
    "pixel unshuffle": lambda c, s: (
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c, s.width, 1), nn.Upsample(scale_factor=2)),
        s.width,
    ),
    "squeeze": lambda c, s: (Squeeze(c, s.width), c),
    "twice": lambda c, s: (Twice(c, s.norm), c),
    "pool": lambda c, s: (nn.MaxPool2d(3, stride=1, padding=1), c),
}


def build(stages: list[Stage], flat: bool = False) -> nn.Module:
    """Build the network with random weights, affine parameters and statistics, in float64 and eval mode."""
    modules, c = [], 3
    for stage in stages:
        module, c = STAGES[stage.kind](c, stage)
        modules.append(module)
    return randomised(nn.Sequential(*modules, Head(c, flat)))


def randomised(model: nn.Module) -> nn.Module:
    """Give everything that starts at zero or one a random value, and return the model in float64 and eval mode."""
    generator = torch.Generator().manual_seed(2)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.double().eval()


@st.composite
def architectures(draw: Any, norms: tuple[str, ...] = EXACT, most: int = 5) -> list[Stage]:
    """Draw one to ``most`` stages whose channels stay few."""
    stages = [Stage("conv", draw(st.integers(2, 8)), 1, draw(st.sampled_from(norms)))]
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(sorted(STAGES)))
        stages.append(Stage(kind, draw(st.integers(1, 6)), draw(st.integers(2, 3)), draw(st.sampled_from(norms))))
    return stages
