"""Attributes whose value fits though they mean something else, and those that must follow."""

# ruff: noqa: RUF059 - modules as people write them
from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import case, image, tokens


@case("attributes", image(), same=["n_layers", "patience"])
class Att1(nn.Module):
    """Literal 4 with an attribute 4 of another meaning used in arithmetic."""

    def __init__(self):
        super().__init__()
        self.n_layers = 4
        self.patience = 4
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.l = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x)
        for i in range(self.n_layers):
            y = y + self.l[i](F.group_norm(y, 4)).relu() / self.patience
        return self.o(y)


@case("attributes", image(), same=["k"], most={"a.weight": 8})
class Att2(nn.Module):
    """Kernel size / stride equal to the number of groups, held by attribute and read by functional."""

    def __init__(self):
        super().__init__()
        self.k = 4
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.w = nn.Parameter(torch.randn(16, 4, 1, 1))
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = F.conv2d(self.a(x), self.w, groups=4).relu()
        return self.o(F.max_pool2d(y, self.k, 1))


@case("attributes", tokens(), same=["n"])
class Att3(nn.Module):
    """One attribute for heads and for steps."""

    def __init__(self):
        super().__init__()
        self.n = 4
        self.a = nn.Linear(8, 16)
        self.q = nn.Linear(16, 48)
        self.p = nn.Linear(16, 16)
        self.o = nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x)
        for _ in range(self.n):
            B, T, C = y.shape
            q, k, v = (t.reshape(B, T, self.n, -1).transpose(1, 2) for t in self.q(y).chunk(3, -1))
            y = y + self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.o(y)


@case("attributes", tokens(), same=["n"])
class Att4(nn.Module):
    """One attribute: heads and the number of classes."""

    def __init__(self):
        super().__init__()
        self.n = 4
        self.a = nn.Linear(8, 16)
        self.q = nn.Linear(16, 48)
        self.o = nn.Linear(16, 4)

    def forward(self, x):
        y = self.a(x)
        B, T, C = y.shape
        q, k, v = (t.reshape(B, T, self.n, -1).transpose(1, 2) for t in self.q(y).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(y).view(B, T, self.n).softmax(-1)


@case("attributes", image(), same=["k"])
class Att5(nn.Module):
    """One attribute: heads and batch repeats (loop unrolled) and top-k."""

    def __init__(self):
        super().__init__()
        self.k = 4
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x)
        y = F.group_norm(y, self.k)
        z = self.o(y).flatten(2)
        return z.topk(self.k, -1)[0]


@case("attributes", image(size=8), same=["size"])
class Att6(nn.Module):
    """Width 8 attr equals image size 8... positions follow."""

    def __init__(self):
        super().__init__()
        self.size = 8
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.o = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        B = y.shape[0]
        return self.o(y.view(B, 8, self.size, self.size))


@case("attributes", image(size=8), same=["size"])
class Att7(nn.Module):
    """Width 8 by attribute, positions 8 by the same attribute."""

    def __init__(self):
        super().__init__()
        self.size = 8
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.o = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        B = y.shape[0]
        return self.o(y.view(B, self.size, self.size, self.size))


@case("attributes", image(), most={"a.weight": 8})
class Att8(nn.Module):
    """An attribute asserts its width."""

    def __init__(self):
        super().__init__()
        self.dim = 16
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        assert y.shape[1] == self.dim, "width"
        return self.o(y)


@case("attributes", image())
class Att9(nn.Module):
    """Compares a width with an unrelated attribute of the same value and takes another branch."""

    def __init__(self):
        super().__init__()
        self.hw = 16
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if y.shape[1] == self.hw:
            y = y * 2
        return self.o(y)


@case("attributes", image())
class Att10(nn.Module):
    """Branch by literal width."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if y.shape[1] > 10:
            y = y * 2
        return self.o(y)


@case("attributes", tokens(), scope="global", name="Att11g")
@case("attributes", tokens(), most={"q1.weight": 24, "q2.weight": 24})
class Att11(nn.Module):
    """Shared config among two blocks with different widths."""

    def __init__(self):
        super().__init__()
        self.c = types.SimpleNamespace(h=4)
        self.e = nn.Linear(8, 16)
        self.q1 = nn.Linear(16, 48)
        self.q2 = nn.Linear(16, 48)
        self.p1 = nn.Linear(16, 16)
        self.p2 = nn.Linear(16, 16)
        self.o = nn.Linear(16, 5)

    def att(self, x, q, p):
        B, T, _ = x.shape
        q, k, v = (t.reshape(B, T, self.c.h, -1).transpose(1, 2) for t in q(x).chunk(3, -1))
        return p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = self.e(x)
        x = x + self.att(x, self.q1, self.p1)
        return self.o(x + self.att(x, self.q2, self.p2))


@case("attributes", tokens(), same=["B.h"], most={"b.0.q.weight": 24})
class Att12(nn.Module):
    """Class attribute shared by two instances."""

    class B(nn.Module):
        h = 4

        def __init__(self):
            super().__init__()
            self.q = nn.Linear(16, 48)
            self.p = nn.Linear(16, 16)

        def forward(self, x):
            B, T, _ = x.shape
            q, k, v = (t.reshape(B, T, self.h, -1).transpose(1, 2) for t in self.q(x).chunk(3, -1))
            return x + self.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(8, 16)
        self.b = nn.ModuleList([self.B(), self.B()])
        self.o = nn.Linear(16, 5)

    def forward(self, x):
        x = self.e(x)
        for b in self.b:
            x = b(x)
        return self.o(x)


@case("attributes", tokens(4), fresh=tokens(4, 7, seed=3), same=["b"], most={"a.weight": 8})
class Att13(nn.Module):
    """Attribute in a view of batch and tokens that equals: batch 4."""

    def __init__(self):
        super().__init__()
        self.b = 4
        self.a = nn.Linear(8, 16)
        self.o = nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x)
        y = F.group_norm(y.transpose(1, 2), 4).transpose(1, 2)
        return self.o(y).view(self.b, -1, 5)


@case("attributes", image(), most={"a.weight": 8})
class Att14(nn.Module):
    """Ints in a ModuleDict-held config; groups from the norm module's own attribute."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.n = nn.GroupNorm(4, 16)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x)
        y = F.group_norm(y, self.n.num_groups, self.n.weight, self.n.bias, self.n.eps)
        return self.o(y.relu())


@case("attributes", image(), most={"a.weight": 8})
class Att15(nn.Module):
    """Conv's own attributes used by functional; a copy of groups held elsewhere."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.g = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.groups = self.g.groups
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        y = F.conv2d(y, self.g.weight, self.g.bias, 1, 1, 1, self.groups)
        return self.o(self.g(y).relu())


@case("attributes", image(), same=["calls"], most={"a.weight": 8})
class Att16(nn.Module):
    """A counter changes in forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        self.calls += 1
        return self.o(F.group_norm(self.a(x), 4))
