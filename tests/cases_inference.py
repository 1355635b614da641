"""Inference mode around a call, inside a forward pass and around construction."""

# ruff: noqa: N802 - modules as people write them
from __future__ import annotations

import torch
from torch import nn

from tests.cases import case, image


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.n = nn.BatchNorm2d(16)
        self.o = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.o(self.n(self.a(x)).relu())


@case("inference", image(), inside=torch.inference_mode, most={"a.weight": 8})
def InsideInference():
    return Small()


@case("inference", image(), inside=torch.no_grad, most={"a.weight": 8})
def InsideNoGrad():
    return Small()


@case("inference", image())
def MadeInInference():
    with torch.inference_mode():
        return Small()


with torch.inference_mode():
    infx = image()


@case("inference", infx, fresh=image(3, seed=4), most={"a.weight": 8})
def InputFromInference():
    return Small()


@case("inference", image(), most={"a.weight": 8}, fresh=image(3, seed=4))
class Dec(Small):
    @torch.inference_mode()
    def forward(self, x):
        return self.o(self.n(self.a(x)).relu())


@case("inference", image(), most={"a.weight": 8})
class Dec2(Small):
    @torch.no_grad()
    def forward(self, x):
        return self.o(self.n(self.a(x)).relu())


@case("inference", image(), train=False, most={"a.weight": 8})
class InfBlock(Small):
    def __init__(self):
        super().__init__()
        self.t = nn.Conv2d(3, 16, 3, padding=1)
        self.l = nn.Linear(16, 16)

    def forward(self, x):
        with torch.inference_mode():
            t = self.l(self.t(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(2, 1)
            t = torch.cat(t, 1)
        return self.o((self.n(self.a(x)) + t.clone()).relu())


@case("inference", image())
class BufInf(Small):
    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("k", torch.rand(16))

    def forward(self, x):
        return self.o(self.n(self.a(x)).relu() * self.k[:, None, None])
