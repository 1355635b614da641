"""Numbers made from widths in whole modules."""

# ruff: noqa: RUF059 - modules as people write them
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import case, image, rows


@case("widths", torch.randint(0, 9, (2, 5)), named=True)
class Emb(nn.Module):
    """Embedding scaled by sqrt(width), tied output."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, 16)
        self.l = nn.Linear(16, 16)

    def forward(self, x):
        y = self.e(x) * math.sqrt(self.e.embedding_dim)
        return (y + self.l(y).relu()) @ self.e.weight.t()


@case("widths", torch.randint(0, 9, (2, 5)))
class Emb2(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = 16
        self.e = nn.Embedding(9, 16)
        self.l = nn.Linear(16, 16)
        self.o = nn.Linear(16, 9)

    def forward(self, x):
        y = self.e(x) * self.d**0.5
        return self.o(y + self.l(y).relu())


@case("widths", image(), most={"f.weight": 8})
class Raft(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 16, 3, padding=1)
        self.g = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Linear(36, 4)

    def forward(self, x):
        a, b = (self.f(x), self.g(x.flip(1)))
        B, C, H, W = a.shape
        c = a.view(B, C, H * W).transpose(1, 2) @ b.view(B, C, H * W)
        c = c / torch.sqrt(torch.tensor(C, dtype=c.dtype))
        return self.o(c)


@case("widths", image(), named=True)
class Raft2(nn.Module):
    """Shared encoder."""

    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(3, 16, 3, padding=1)
        self.n = nn.BatchNorm2d(16)
        self.o = nn.Linear(36, 4)

    def forward(self, x):
        a, b = torch.cat([self.n(self.f(x)), self.n(self.f(x.flip(1)))]).chunk(2)
        B, C, H, W = a.shape
        return self.o(torch.einsum("bchw,bcxy->bhwxy", a, b).reshape(B, 36, 36) / C**0.5)


@case("widths", rows(), named=True)
class CosT(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 16)
        self.g = nn.Linear(8, 16)

    def forward(self, x):
        return F.cosine_similarity(self.f(x), self.g(x), -1) * self.f(x).shape[-1] ** 0.5


@case("widths", rows(), most={"f.weight": 8}, named=True)
class RmsW(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 16)
        self.g = nn.Parameter(torch.rand(16))
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        y = self.f(x)
        return self.o(F.normalize(y, dim=-1) * y.shape[-1] ** 0.5 * self.g)


@case("widths", rows())
class RmsS(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 16)
        self.scale = 16**0.5
        self.g = nn.Parameter(torch.rand(16))
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        y = self.f(x)
        return self.o(F.normalize(y, dim=-1) * self.scale * self.g)


@case("widths", rows(), named=True)
class Std(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 16)
        self.o = nn.Linear(16, 3)

    def forward(self, x):
        y = self.f(x)
        return self.o((y - y.mean(-1, keepdim=True)) / (y.norm(dim=-1, keepdim=True) / math.sqrt(y.shape[-1]) + 0.1))


@case("widths", rows(), most={"a.weight": 8}, named=True)
class WInit(nn.Module):
    """Equalised lr: weight scaled at run time by fan-in."""

    class L(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(o, i))
            self.scale = i ** (-0.5)

        def forward(self, x):
            return F.linear(x, self.weight * self.scale)

    class D(L):
        def forward(self, x):
            return F.linear(x, self.weight * self.weight.shape[1] ** (-0.5))

    def __init__(self):
        super().__init__()
        self.a = self.L(8, 16)
        self.b = self.D(16, 16)
        self.c = self.D(16, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())
