"""What only training runs, or computes otherwise."""

# ruff: noqa: B905 - modules as people write them
from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import case, image


class Tr(nn.Module):
    B = False

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.o = nn.Conv2d(16, 4, 1)
        self.__dict__["_mk"] = 0


@case("training", image(), named=True)
class Tr1(Tr):
    """Scale by width in train mode only."""

    def forward(self, x):
        y = self.a(x).relu()
        if self.training:
            y = y / y.shape[1] ** 0.5
        return self.o(y)


@case("training", image(), named=True)
class Tr2(Tr):
    """Pointwise constant of an attribute in train mode only."""

    def __init__(self):
        super().__init__()
        self.dim = 16

    def forward(self, x):
        y = self.a(x).relu()
        assert y.shape[1] == self.dim
        return self.o(y * self.dim ** (-0.5) if self.training else y)


@case("training", image())
class Tr3(Tr):
    """Literal group norm in train."""

    def forward(self, x):
        y = self.a(x)
        return self.o(F.group_norm(y, 4) if self.training else y)


@case("training", image())
class Tr4(Tr):
    """Literal slices in training only: mixup on channels."""

    def forward(self, x):
        y = self.a(x).relu()
        if self.training:
            y = torch.cat([y[:, :4].softmax(1), y[:, 4:]], 1)
        return self.o(y)


@case("training", image())
class Tr5(Tr):
    """Dropout2d + channel dropout with literal width."""

    def forward(self, x):
        y = F.dropout2d(self.a(x).relu(), 0.5, self.training)
        if self.training:
            y = y * (torch.rand(x.shape[0], 16, 1, 1, dtype=y.dtype) > 0.5)
        return self.o(y)


@case("training", image())
class Tr6(Tr):
    """Is_grad_enabled branch."""

    def __init__(self):
        super().__init__()
        self.g = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if torch.is_grad_enabled():
            y = y + self.g(y)
        return self.o(y)


@case("training", image())
class Tr7(Tr):
    """Requires_grad of input branch."""

    def __init__(self):
        super().__init__()
        self.g = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if y.requires_grad:
            y = y + self.g(F.group_norm(y, 4))
        return self.o(y)


class TrB(Tr):
    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(16, 16, 3, padding=1)


@case("training", image())
class Tr8(TrB):
    """Targets given in training."""

    def forward(self, x, t=None):
        y = self.b(self.a(x).relu()).relu()
        if self.training:
            return F.cross_entropy(self.o(y), torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.long))
        return self.o(y)


@case("training", image(), most={"a.weight": 8})
class Tr9(TrB):
    """Stochastic depth around a block whose norm is literal."""

    def forward(self, x):
        y = self.a(x).relu()
        if not self.training or torch.rand(1).item() < 0.5:
            y = y + F.group_norm(self.b(y), 4)
        return self.o(y)


@case("training", image())
class Tr10(TrB):
    """Submodule's training flag differs (frozen bn in eval) and parent checks self.b.training."""

    def __init__(self):
        super().__init__()
        self.x = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if self.b.training:
            y = y + self.x(y).softmax(1)
        return self.o(self.b(y))


@case("training", image())
class Tr11(Tr):
    """Training seen through a property."""

    def __init__(self):
        super().__init__()
        self.x = nn.Conv2d(16, 16, 1)

    @property
    def learning(self):
        return self.training

    def forward(self, x):
        y = self.a(x).relu()
        if self.learning:
            y = y + self.x(y)
        return self.o(y)


@case("training", image())
class Tr12(Tr):
    """Training read by getattr with a string."""

    def forward(self, x):
        y = self.a(x).relu()
        if self.training:
            y = F.group_norm(y, 4)
        return self.o(y)


@case("training", image())
class Tr13(Tr):
    """Train() overridden sets another flag."""

    def __init__(self):
        super().__init__()
        self.mode = "eval"

    def train(self, m=True):
        self.mode = "train" if m else "eval"
        return super().train(m)

    def forward(self, x):
        y = self.a(x).relu()
        if self.mode == "train":
            y = F.group_norm(y, 4)
        return self.o(y)


@case("training", image())
class Tr14(Tr):
    """A helper function outside of the class reads training."""

    def forward(self, x):
        return self.o(_norm_in_training(self, self.a(x).relu()))


def _norm_in_training(m, y):
    return F.group_norm(y, 4) if m.training else y


@case("training", image())
class Tr15(Tr):
    """Nn.Sequential subclass / lambda module."""

    class L(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return self.f(self, x)

    def __init__(self):
        super().__init__()
        self.n = self.L(lambda m, y: F.group_norm(y, 4) if m.training else y)

    def forward(self, x):
        return self.o(self.n(self.a(x).relu()))


@case("training", image())
class Tr16(Tr):
    """Forward hook that acts in training."""

    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda m, i, o: F.group_norm(o, 4) if m.training else o)

    def forward(self, x):
        return self.o(self.a(x).relu())


@case("training", image(), most={"a.weight": 8})
class Tr17(Tr):
    """BatchNorm functional with self.training & literal momentum and running stats of other widths."""

    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.zeros(16))
        self.register_buffer("v", torch.ones(16))

    def forward(self, x):
        return self.o(F.batch_norm(self.a(x), self.m, self.v, training=self.training).relu())


@case("training", image(), named=True)
class Tr18(Tr):
    """Train-only regulariser output: off-diagonal Gram matrix over channels."""

    def forward(self, x):
        y = self.a(x).relu()
        z = self.o(y)
        if self.training:
            f = y.flatten(2)
            g = f @ f.mT / y.shape[1]
            return (z, g.square().mean())
        return z


@case("training", image(), most={"a.weight": 8})
class Tr19(Tr):
    """Train only: EMA buffer of mean feature, literal width."""

    def __init__(self):
        super().__init__()
        self.register_buffer("c", torch.zeros(16))

    def forward(self, x):
        y = self.a(x).relu()
        if self.training:
            self.c.mul_(0.9).add_(y.mean((0, 2, 3)).detach(), alpha=0.1)
        return self.o(y - self.c[:, None, None])


@case("training", image(), most={"a.weight": 8, "b.weight": 8})
class Tr20(TrB):
    """Train only: deep supervision with another resolution."""

    def __init__(self):
        super().__init__()
        self.aux = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(2))

    def forward(self, x):
        y = self.a(x).relu()
        z = self.b(y).relu()
        o = self.o(z)
        return [o] + [m(f) for m, f in zip(self.aux, (y, z))] if self.training else o


@case("training", image())
class Tr21(Tr):
    """Eval only branch: BN folding, in training something else."""

    def __init__(self):
        super().__init__()
        self.x = nn.Conv2d(3, 16, 1)
        self.y = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x):
        return self.o((self.x(x) + self.y(x)).relu() if self.training else self.a(x).relu())


@case("training", image())
class Tr22(Tr):
    """Training needs batch >= 3 (raises otherwise)."""

    def __init__(self):
        super().__init__()
        self.g = nn.Linear(16, 16)

    def forward(self, x):
        y = self.a(x).relu().mean((2, 3))
        if self.training:
            assert x.shape[0] > 2, "batch"
            y = self.g(y).softmax(1)
        return self.o(y[:, :, None, None])


@case("training", image(), named=True)
class Tr23(Tr):
    """Noise in training by constant made from width via python float math."""

    def __init__(self):
        super().__init__()
        self.scale = math.sqrt(16)

    def forward(self, x):
        y = self.a(x).relu()
        if self.training:
            y = y + torch.randn_like(y) * 0 + y.mean(1, keepdim=True) * y.size(1)
        return self.o(y)


@case("training", image())
class Tr24(Tr):
    """VQ style: codebook updates and straight-through."""

    def __init__(self):
        super().__init__()
        self.register_buffer("code", torch.randn(10, 16))

    def forward(self, x):
        y = self.a(x).permute(0, 2, 3, 1)
        d = torch.cdist(y.reshape(-1, y.shape[-1]), self.code)
        k = d.argmin(1)
        q = self.code[k].view(y.shape)
        if self.training:
            q = y + (q - y).detach()
        return self.o(q.permute(0, 3, 1, 2))


@case("training", image(1), name="Tr25one")
@case("training", image())
class Tr25(Tr):
    """Groups of a norm twice as many in training."""

    def forward(self, x):
        return self.o(F.group_norm(self.a(x), 8 if self.training else 4))


@case("training", image())
class Tr26(Tr):
    """Decorated forward."""

    @functools.wraps(F.relu)
    def helper(self):
        pass

    @torch.no_grad()
    def forward(self, x):
        y = self.a(x).relu()
        return self.o(F.group_norm(y, 4) if self.training else y)


@case("training", image())
class Tr27(Tr):
    """Parametrised by a callable attribute holding a bound method of a submodule."""

    def __init__(self):
        super().__init__()
        self.f = functools.partial(Tr27.fn, self.__dict__)

    @staticmethod
    def fn(d, y, t):
        return F.group_norm(y, 4) if t else y

    def forward(self, x):
        return self.o(self.f(self.a(x).relu(), self.a.training is not False))


@case("training", image())
class Tr28(Tr):
    """Slices of other lengths in training, same operators."""

    def forward(self, x):
        y = self.a(x)
        n = 4 if self.training else 8
        return self.o(torch.cat([y[:, :n].softmax(1), y[:, n:]], 1))


@case("training", image(), most={"a.weight": 8})
class Tr29(Tr):
    """Stochastic depth via torch.rand per sample, python float decision from python random."""

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        import random as R

        y = self.a(x).relu()
        if self.training and R.random() < 0.5:
            return self.o(y)
        m = torch.rand(x.shape[0], 1, 1, 1, dtype=y.dtype) > 0.2 if self.training else 1
        return self.o(y + self.b(y) * m)
