"""Right cuts of modules that must not be refused: parametrised weights, kernels made from data, graph networks."""

# ruff: noqa: E741, N802 - modules as people write them
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.cases import case, image, rows

EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])


@case("operators", image(), tolerance=1e-06, train=False)
def Spectral():
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        spectral_norm(nn.Conv2d(16, 24, 3)),
        nn.ReLU(),
        spectral_norm(nn.Conv2d(24, 4, 1)),
    )


@case("operators", image(), train=False)
def OldSpectral():
    return nn.Sequential(
        torch.nn.utils.spectral_norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        torch.nn.utils.spectral_norm(nn.Conv2d(16, 24, 3)),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )


@case("operators", image())
def WeightNorm():
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), weight_norm(nn.Conv2d(16, 24, 3)), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )


@case("operators", image())
def Ortho():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), orthogonal(nn.Conv2d(16, 24, 1)), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )


class Sym(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


@case("operators", rows())
def Symm():
    m = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    parametrize.register_parametrization(m[2], "weight", Sym())
    return m


class Soft(nn.Module):
    def forward(self, w):
        return F.softplus(w)


@case("operators", rows())
def Positive():
    m = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    parametrize.register_parametrization(m[2], "weight", Soft())
    return m


class WS(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        m = w.mean((1, 2, 3), keepdim=True)
        v = w.var((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (w - m) / (v + 1e-05).sqrt(), self.bias)


@case("operators", image())
def WStd():
    return nn.Sequential(WS(3, 16, 3), nn.ReLU(), WS(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 1))


class Lora(nn.Module):
    def __init__(self, l, r=4):
        super().__init__()
        self.l = l
        self.A = nn.Parameter(torch.randn(r, l.in_features))
        self.B = nn.Parameter(torch.randn(l.out_features, r))
        self.scale = 1 / r

    def forward(self, x):
        return self.l(x) + x @ self.A.t() @ self.B.t() * self.scale


@case("operators", rows())
def LoraNet():
    return nn.Sequential(Lora(nn.Linear(8, 16)), nn.ReLU(), Lora(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 3))


@case("operators", rows())
class Hyper(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(8, 12)
        self.h = nn.Linear(8, 12 * 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x):
        w = self.h(x).view(-1, 12, 6)
        return self.o(torch.einsum("bi,bij->bj", self.e(x), w).relu())


@case("operators", image(), most={"a.weight": 6})
class Dyn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.k = nn.Parameter(torch.randn(4, 8, 12, 1, 1) * 0.3)
        self.g = nn.Linear(12, 4)
        self.o = nn.Conv2d(8, 4, 1)
        self.n_in, self.n_out = (12, 8)

    def forward(self, x):
        y = F.relu(self.a(x))
        B, C, H, W = y.shape
        w = (self.g(y.mean((2, 3))).softmax(1) @ self.k.view(4, -1)).view(B * self.n_out, self.n_in, 1, 1)
        return self.o(F.relu(F.conv2d(y.reshape(1, B * C, H, W), w, groups=B).view(B, self.n_out, H, W)))


@case("operators", image(), most={"a.weight": 6})
class StyleMod(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.w = nn.Parameter(torch.randn(1, 10, 12, 3, 3))
        self.s = nn.Linear(3, 12)
        self.o = nn.Conv2d(10, 4, 1)

    def forward(self, x):
        y = self.a(x)
        B, C, H, W = y.shape
        st = self.s(x.mean((2, 3))).view(B, 1, C, 1, 1) + 1
        w = self.w * st
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-08)
        y = F.conv2d(y.reshape(1, B * C, H, W), w.view(B * 10, C, 3, 3), padding=1, groups=B).view(B, 10, H, W)
        return self.o(y.relu())


@case("operators", torch.randint(0, 9, (2, 5)), fresh=torch.randint(0, 9, (3, 7)), most={"e.weight": 9})
class LlamaRope(nn.Module):
    def __init__(self):
        super().__init__()
        self.nh = 2
        self.hd = 8
        self.e = nn.Embedding(9, 16)
        self.q = nn.Linear(16, 16, bias=False)
        self.k = nn.Linear(16, 16, bias=False)
        self.v = nn.Linear(16, 16, bias=False)
        self.o = nn.Linear(16, 16, bias=False)
        self.h = nn.Linear(16, 9)
        self.f = torch.polar(torch.ones(10, 4), torch.outer(torch.arange(10.0), 1 / 100 ** (torch.arange(4) / 4)))

    def rot(self, t, f):
        z = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2))
        return torch.view_as_real(z * f[None, :, None]).flatten(3).type_as(t)

    def forward(self, i):
        x = self.e(i)
        B, T, _ = x.shape
        q, k, v = (l(x).view(B, T, self.nh, self.hd) for l in (self.q, self.k, self.v))
        f = self.f[:T].to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
        q, k = (self.rot(q, f), self.rot(k, f))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).reshape(B, T, -1)
        return self.h(x + self.o(y))


@case("operators", (rows(), EDGES), fresh=(rows(4, seed=7), EDGES), most={"a.weight": 8, "b.weight": 8})
class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 16)
        self.o = nn.Linear(16, 3)

    def agg(self, x, e):
        out = torch.zeros_like(x)
        out.index_add_(0, e[1], x[e[0]])
        d = torch.zeros(x.shape[0], dtype=x.dtype).scatter_add_(0, e[1], torch.ones(e.shape[1], dtype=x.dtype))
        return out / d.clamp(min=1)[:, None]

    def forward(self, x, e):
        x = self.agg(self.a(x), e).relu()
        x = self.agg(self.b(x), e).relu()
        return self.o(x)


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])


@case("operators", (rows(), EDGES), fresh=(rows(4, seed=7), EDGES), most={"w.weight": 8})
class GAT(GCN):
    def __init__(self):
        super().__init__()
        self.h = 2
        self.w = nn.Linear(8, 16)
        self.att = nn.Parameter(torch.randn(1, 2, 8))
        self.o = nn.Linear(16, 3)

    def forward(self, x, e):
        z = self.w(x).view(-1, self.h, 8)
        a = ((z[e[0]] + z[e[1]]).relu() * self.att).sum(-1)
        a = (a - a.max()).exp()
        d = torch.zeros(x.shape[0], self.h, dtype=x.dtype).index_add(0, e[1], a)
        a = a / d[e[1]]
        return self.o(torch.zeros_like(z).index_add(0, e[1], z[e[0]] * a[..., None]).flatten(1))
