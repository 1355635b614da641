"""Detectors whose selections are empty on the example, and outputs that only some inputs lead to."""

# ruff: noqa: B905 - modules as people write them
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.cases import case, image, tokens


class Det(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.box = nn.Conv2d(16, 4, 1)
        self.cls = nn.Conv2d(16, 1, 1)
        self.t = 9.0
        self.emb = nn.Conv2d(16, 8, 1)

    def scores(self, y):
        return self.cls(y).flatten()


def opendet(m):
    m.t = 0.1


@case("empty", image(), opened=opendet)
class Det1(Det):
    """Mask on a feature, then a linear head on what is selected."""

    def __init__(self):
        super().__init__()
        self.h = nn.Linear(8, 6)
        self.h2 = nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x).relu()
        k = self.scores(y) > self.t
        e = self.emb(y).permute(0, 2, 3, 1).reshape(-1, 8)[k]
        b = self.box(y).permute(0, 2, 3, 1).reshape(-1, 4)[k]
        return (self.h2(self.h(e).relu()), b)


@case("empty", image(), opened=opendet)
class Det2(Det):
    """Index_select, cat with coordinates, stack."""

    def forward(self, x):
        y = self.a(x).relu()
        k = (self.scores(y) > self.t).nonzero().squeeze(1)
        b = self.box(y).permute(0, 2, 3, 1).reshape(-1, 4).index_select(0, k)
        x0, y0, w, h = b.unbind(-1)
        return torch.stack([x0 - w, y0 - h, x0 + w, y0 + h], -1)


@case("empty", image(), opened=opendet)
class Det3(Det):
    """Loop over detections."""

    def forward(self, x):
        y = self.a(x).relu()
        k = self.scores(y) > self.t
        e = self.emb(y).permute(0, 2, 3, 1).reshape(-1, 8)
        r = [e[i] @ e[i] for i in k.nonzero().flatten().tolist()]
        return (torch.stack(r) if r else e.new_zeros(0), self.box(y))


@case("empty", image(), opened=opendet)
class Det4(Det):
    """Second stage with its own layers only on proposals."""

    def __init__(self):
        super().__init__()
        self.r = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x):
        y = self.a(x).relu()
        k = self.scores(y) > self.t
        e = self.emb(y).permute(0, 2, 3, 1).reshape(-1, 8)
        return (self.r(e[k]) if k.any() else e.new_zeros(0, 3), self.box(y).mean())


@case("empty", image(), opened=opendet)
class Det5(Det):
    """Masked_select, bincount of the selected; topk of zero."""

    def forward(self, x):
        y = self.a(x).relu()
        z = self.emb(y)
        return (
            torch.masked_select(
                z, (self.scores(y) > self.t).view(2 if x.shape[0] == 2 else x.shape[0], 1, *x.shape[2:])
            ).view(-1, 8 if False else z.shape[1])
            if False
            else torch.masked_select(
                z.permute(0, 2, 3, 1), (self.scores(y) > self.t).view(x.shape[0], *x.shape[2:], 1)
            ),
            self.box(y),
        )


@case("empty", image(), opened=lambda m: setattr(m, "n", 2))
class Det6(Det):
    """Empty by a slice of zero rows: y[:0]."""

    def __init__(self):
        super().__init__()
        self.n = 0
        self.h = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return (self.h(self.emb(y)[: self.n]), self.box(y))


@case("empty", (tokens(), torch.zeros(2, 0, 8)), fresh=(tokens(3), tokens(3, 4, seed=5)))
class Det7(Det):
    """An empty sequence input: memory of length zero that is concatenated."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 16)
        self.k = nn.Linear(8, 16)
        self.v = nn.Linear(8, 16)
        self.m = nn.Linear(8, 16)
        self.o = nn.Linear(16, 5)

    def forward(self, x, mem):
        q = self.q(x)
        k = torch.cat([self.m(mem), self.k(x)], 1)
        v = torch.cat([self.m(mem), self.v(x)], 1)
        return self.o(F.scaled_dot_product_attention(q, k, v))


@case("empty", tokens(), fresh=tokens(3))
class Det8(Det):
    """Kv cache empty at the first step."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(8, 16)
        self.kv = nn.Linear(16, 32)
        self.q = nn.Linear(16, 16)
        self.o = nn.Linear(16, 5)

    def forward(self, x, past=None):
        y = self.e(x)
        k, v = self.kv(y).chunk(2, -1)
        if past is not None and past[0].shape[1]:
            k, v = (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
        return (self.o(F.scaled_dot_product_attention(self.q(y), k, v)), (k, v))


@case("empty", image(), opened=opendet)
class Det9(Det):
    """Sum over an empty selection adds zero."""

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(3, 16, 1)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        z = self.b(x).permute(0, 2, 3, 1).reshape(-1, 16)
        k = self.scores(y) > self.t
        return self.o(y + z[k].sum(0)[None, :, None, None])


@case("empty", image(), opened=opendet)
class Det10(Det):
    """Scatter of an empty set into the features."""

    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(3, 16, 1)
        self.o = nn.Linear(16, 5)

    def forward(self, x):
        y = self.a(x).relu()
        z = self.b(x).permute(0, 2, 3, 1).reshape(-1, 16)
        k = (self.scores(y) > self.t).nonzero().squeeze(1)
        f = y.permute(0, 2, 3, 1).reshape(-1, 16)
        return self.o(f.index_add(0, k, z[k]))


@case("empty", image(), opened=opendet)
class Det11(Det):
    """Empty then normalised per channel piece."""

    def __init__(self):
        super().__init__()
        self.o = nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x).relu()
        e = self.emb(y).permute(0, 2, 3, 1).reshape(-1, 8)[self.scores(y) > self.t]
        return (self.o(torch.cat([e[:, :4].softmax(1), e[:, 4:].softmax(1)], 1)), self.box(y))


@case("empty", image(), opened=opendet)
class Det12(Det):
    """Dict of detections per image, with literal view."""

    def forward(self, x):
        y = self.a(x).relu()
        out = []
        for b, c in zip(self.box(y), self.cls(y)):
            k = c[0] > self.t
            out.append({"boxes": b[:, k].t(), "s": c[0][k]})
        return out


@case("empty", image(), opened=opendet)
class Det13(Det):
    """Roi crops: no proposal."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(16 * 4, 6)
        self.f2 = nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x).relu()
        idx = (self.scores(y) > self.t).nonzero().flatten()[:3]
        crops = [y[:1, :, :2, :2] for _ in idx.tolist()]
        c = torch.cat(crops) if crops else y.new_zeros(0, y.shape[1], 2, 2)
        return (self.f2(self.f(c.flatten(1)).relu()), self.box(y))


@case("empty", torch.zeros(2, 0, dtype=torch.long), fresh=torch.randint(0, 9, (3, 4)))
class Det14(Det):
    """Embedding_bag / lookup of no ids."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, 12)
        self.l = nn.Linear(12, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, i):
        return self.o(self.l(self.e(i)).relu())


@case("empty", image(), opened=opendet)
class Det15(Det):
    """Boxes only returned where any was found."""

    def forward(self, x):
        y = self.a(x).relu()
        k = self.scores(y) > self.t
        b = self.box(y).permute(0, 2, 3, 1).flatten(0, 2)
        return b[k] if k.any() else b.new_zeros(0, 4)


@case("empty", image(), calls=({}, {"feats": True}))
class Det16(Det):
    """Features returned on demand."""

    def forward(self, x, feats=False):
        y = self.a(x).relu()
        e = self.emb(y)
        z = self.box(y)
        return (z, e) if feats else z
