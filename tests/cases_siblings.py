"""Modules that did not run on the example, beside others of equal shape that did, and decisions by data."""

# ruff: noqa: B905, E741, RUF005, RUF059 - modules as people write them
from __future__ import annotations

import torch
from torch import nn

from tests.cases import case, image, rows


class Sib(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)

    def feats(self, x):
        y = self.a(x).relu()
        return (y, self.b(y).relu())


@case("siblings", image(), calls=({}, {"task": "y"}), idle=["heads.y.weight", "heads.z.weight"])
class Sib1(Sib):
    """ModuleDict of task heads of which one runs, others read another stage."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"x": nn.Conv2d(16, 4, 1), "y": nn.Conv2d(16, 4, 1), "z": nn.Conv2d(16, 4, 1)})

    def forward(self, x, task="x"):
        y, z = self.feats(x)
        return self.heads[task]({"x": z, "y": y, "z": y + 0 * y}[task])


@case("siblings", image(), calls=({}, {"third": True}))
class Sib2(Sib):
    """Two ran on the same tensor, and a third would read it too."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(3))

    def forward(self, x, third=False):
        y, z = self.feats(x)
        r = [self.heads[0](z), self.heads[1](z)]
        return r + [self.heads[2](z)] if third else r


@case("siblings", image(1))
class Sib3(Sib):
    """MoE router chosen by data: idle experts share input; but one expert reads y (by literal index)."""

    def __init__(self):
        super().__init__()
        self.r = nn.Linear(16, 4)
        self.ex = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.o = nn.Linear(16, 4)

    def forward(self, x):
        y, z = (t.mean((2, 3)) for t in self.feats(x))
        k = self.r(z).argmax(-1)
        out = torch.zeros_like(z)
        for i, e in enumerate(self.ex):
            m = k == i
            if m.any():
                out[m] = e((y if i == 3 else z)[m])
        return self.o(out)


@case("siblings", image(1), most={"ex.0.0.weight": 6})
class Sib4(Sib):
    """Ordinary MoE: idle experts must be cut alike."""

    def __init__(self):
        super().__init__()
        self.r = nn.Linear(16, 4)
        self.ex = nn.ModuleList(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(4))
        self.o = nn.Linear(16, 4)

    def forward(self, x):
        y, z = (t.mean((2, 3)) for t in self.feats(x))
        k = self.r(z).argmax(-1)
        out = torch.zeros_like(z)
        for i, e in enumerate(self.ex):
            m = (k == i).nonzero().flatten()
            if m.numel():
                out = out.index_add(0, m, e(z[m]))
        return self.o(out)


@case("siblings", image(), idle=["ad.1.weight"])
class Sib5(Sib):
    """Different adapters by an int attribute; the other adapters read later features."""

    def __init__(self):
        super().__init__()
        self.ad = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)])
        self.which = 0
        self.o = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y, z = self.feats(x)
        return self.o(self.ad[0](y) if self.which == 0 else self.ad[1](z))


@case("siblings", image(), opened=lambda m: setattr(m, "t", 2.0))
class Sib6(Sib):
    """Early exit by confidence, exits read their own stage."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.ex = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))
        self.t = -1.0

    def forward(self, x):
        y, z = self.feats(x)
        for f, e in zip((y, z, self.c(z).relu()), self.ex):
            p = e(f.mean((2, 3))).softmax(-1)
            if p.max() > self.t:
                return p
        return p


@case("siblings", image(), calls=({}, {"lang": "de"}), idle=["de.weight"])
class Sib7(Sib):
    """Language-specific layers chosen by an argument; parameters not in lists."""

    def __init__(self):
        super().__init__()
        self.en = nn.Linear(16, 4)
        self.de = nn.Linear(16, 4)

    def forward(self, x, lang="en"):
        y, z = self.feats(x)
        return getattr(self, lang)((z if lang == "en" else y).mean((2, 3)))


@case("siblings", image(), idle=["hi.weight"])
class Sib8(Sib):
    """Per-resolution branch: other image size runs another conv."""

    def __init__(self):
        super().__init__()
        self.lo = nn.Conv2d(16, 4, 1)
        self.hi = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y, z = self.feats(x)
        return self.lo(z) if x.shape[-1] < 10 else self.hi(y)


@case("siblings", image(), idle=["w.1"])
class Sib9(Sib):
    """Bank of parameters in a ParameterList; only one is used."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(4, 16)) for _ in range(3))

    def forward(self, x, k=0):
        y, z = self.feats(x)
        return (z if k == 0 else y).mean((2, 3)) @ self.w[k].t()


@case("siblings", image(), opened=lambda m: setattr(m, "run", [0, 1, 2, 3]))
class Sib10(Sib):
    """Layer drop: skipped layers of a stack in the example."""

    def __init__(self):
        super().__init__()
        self.l = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))
        self.run = [0, 2]
        self.o = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y, z = self.feats(x)
        for i in self.run:
            z = z + self.l[i](z).relu()
        return self.o(z)


@case("siblings", image(), idle=["bn.1.weight"])
class Sib11(Sib):
    """Slimmable: bn per width index, unused bn's."""

    def __init__(self):
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.o = nn.Conv2d(16, 4, 1)

    def forward(self, x, k=0):
        y, z = self.feats(x)
        return self.o(self.bn[k](z))


@case("siblings", image())
class Sib12(Sib):
    """Dropped in eval: a ModuleDict with train head sharing with another stage."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleDict({"main": nn.Linear(16, 4), "aux": nn.Linear(16, 4)})

    def forward(self, x):
        y, z = (t.mean((2, 3)) for t in self.feats(x))
        r = {"main": self.h["main"](z)}
        if self.training:
            r["aux"] = self.h["aux"](y)
        return r


@case("decisions", image())
class Exit(Sib):
    """Exits by confidence, opened at each."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.ex = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))
        self.t = [-1.0, -1.0]

    def forward(self, x):
        y, z = self.feats(x)
        for f, e, t in zip((y, z), self.ex, self.t):
            p = e(f.mean((2, 3))).softmax(-1)
            if p.max() > t:
                return p
        return self.ex[2](self.c(z).relu().mean((2, 3)))


@case("decisions", image(), name="Exit first", opened=lambda m: setattr(m, "t", [2.0, -1.0]))
@case("decisions", image(), name="Exit none", opened=lambda m: setattr(m, "t", [2.0, 2.0]))
class ExitLast(Exit):
    pass


@case("decisions", rows(), most={"a.weight": 8, "e.0.weight": 3, "e.1.weight": 3, "e.2.weight": 3})
class Route(nn.Module):
    """Router by argmax over two experts that return different widths."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.r = nn.Linear(16, 3)
        self.e = nn.ModuleList(nn.Linear(16, 6) for _ in range(3))
        self.o = nn.Linear(6, 4)

    def forward(self, x):
        y = self.a(x).relu()
        k = int(self.r(y.mean(0)).argmax())
        return self.o(self.e[k](y).relu())


@case("decisions", rows(1), fresh=rows(20, seed=4), most={"a.weight": 8, **{f"e.{i}.0.weight": 6 for i in range(6)}})
class TopK(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.r = nn.Linear(16, 6)
        self.e = nn.ModuleList(nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16)) for _ in range(6))
        self.o = nn.Linear(16, 4)

    def forward(self, x):
        y = self.a(x)
        w, k = self.r(y).softmax(-1).topk(2, -1)
        out = torch.zeros_like(y)
        for i, e in enumerate(self.e):
            t, j = torch.where(k == i)
            if t.numel() == 0:
                continue
            out = out.index_add(0, t, e(y[t]) * w[t, j, None])
        return self.o(y + out)


@case("decisions", rows(), opened=lambda m: setattr(m, "t", 99.0), most={"a.weight": 8})
class Halting(nn.Module):
    """Adaptive computation: loop until confident, with separate layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.l = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.h = nn.Linear(16, 1)
        self.o = nn.Linear(16, 3)
        self.t = -9.0

    def forward(self, x):
        y = self.a(x)
        for l in self.l:
            y = y + l(y).tanh()
            if self.h(y).mean() > self.t:
                break
        return self.o(y)
