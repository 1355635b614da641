"""Numbers that code uses, held in every place where code may hold them: each use with each holder is a case.

A number is written as ``@4@`` in a use, and a statistic of ``t`` along dimension ``d`` as ``<t,d>``.
"""

from __future__ import annotations

import re
import textwrap

import torch

from tests.cases import case, image, tokens

PRELUDE = """
import argparse
import collections
import enum
import functools
import math
import operator
import types
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def ident(x, k):
    return k
"""

# holder -> (lines above the class, in the class, in its constructor, and the expression that reads it), with {N} for
# the number and {n} for its name
HOLDERS = {
    "literal": ("", "", "", "{N}"),
    "attr": ("", "", "self.{n} = {N}", "self.{n}"),
    "config": ("", "", "self.cfg_{n} = types.SimpleNamespace(k={N}, other={N})", "self.cfg_{n}.k"),
    "nested config": (
        "",
        "",
        "self.cfg_{n} = types.SimpleNamespace(model=types.SimpleNamespace(k={N}))",
        "self.cfg_{n}.model.k",
    ),
    "frozen": (
        "@dataclass(frozen=True)\nclass Fz{n}:\n    k: int = {N}\n",
        "",
        "self.fz_{n} = Fz{n}()",
        "self.fz_{n}.k",
    ),
    "slots": (
        "class Sl{n}:\n    __slots__=('k',)\n    def __init__(s): s.k={N}\n",
        "",
        "self.sl_{n} = Sl{n}()",
        "self.sl_{n}.k",
    ),
    "configclass": ("class Cc{n}:\n    k = {N}\n", "", "self.cc_{n} = Cc{n}", "self.cc_{n}.k"),
    "configprop": (
        "class Cp{n}:\n    def __init__(s): s._k={N}\n    @property\n    def k(s): return s._k\n",
        "",
        "self.cp_{n} = Cp{n}()",
        "self.cp_{n}.k",
    ),
    "namespace": ("", "", "self.ns_{n} = argparse.Namespace(k={N})", "self.ns_{n}.k"),
    "dict": ("", "", "self.d_{n} = dict(k={N})", "self.d_{n}['k']"),
    "dictget": ("", "", "self.d_{n} = dict(k={N})", "self.d_{n}.get('k', 1)"),
    "nested dict": ("", "", "self.d_{n} = dict(a=dict(k={N}))", "self.d_{n}['a']['k']"),
    "list": ("", "", "self.l_{n} = [1, {N}]", "self.l_{n}[1]"),
    "tuple": ("", "", "self.t_{n} = (1, {N})", "self.t_{n}[1]"),
    "namedtuple": ("NT{n} = collections.namedtuple('NT', 'j k')\n", "", "self.nt_{n} = NT{n}(1, {N})", "self.nt_{n}.k"),
    "size": ("", "", "self.sz_{n} = torch.Size([1, {N}])", "self.sz_{n}[1]"),
    "class": ("", "{n} = {N}", "", "self.{n}"),
    "classdict": ("", "{n} = dict(k={N})", "", "self.{n}['k']"),
    "type": ("", "{n} = {N}", "", "type(self).{n}"),
    "property": ("", "@property\ndef {n}(self): return {N}", "", "self.{n}"),
    "property of attr": ("", "@property\ndef {n}(self): return self.{n}_held", "self.{n}_held = {N}", "self.{n}"),
    "cached": ("", "@functools.cached_property\ndef {n}(self): return {N}", "", "self.{n}"),
    "method": ("", "def {n}(self): return {N}", "", "self.{n}()"),
    "static": ("", "@staticmethod\ndef {n}(): return {N}", "", "self.{n}()"),
    "global": ("G{n} = {N}\n", "", "", "G{n}"),
    "globaldict": ("G{n} = dict(k={N})\n", "", "", "G{n}['k']"),
    "enum": ("class E{n}(enum.IntEnum):\n    k = {N}\n", "", "", "E{n}.k"),
    "np": ("", "", "self.np_{n} = np.int64({N})", "self.np_{n}"),
    "intnp": ("", "", "self.np_{n} = np.int64({N})", "int(self.np_{n})"),
    "buffer": ("", "", "self.register_buffer('bf_{n}', torch.tensor({N}))", "int(self.bf_{n})"),
    "buffer item": ("", "", "self.register_buffer('bf_{n}', torch.tensor({N}))", "self.bf_{n}.item()"),
    "tensor attr": ("", "", "self.ta_{n} = torch.tensor({N})", "int(self.ta_{n})"),
    "string": ("", "", "self.s_{n} = '{N}'", "int(self.s_{n})"),
    "format": ("", "", "self.f_{n} = {N}", "int(f'{{self.f_{n}}}')"),
    "float": ("", "", "self.f_{n} = {N}.0", "int(self.f_{n})"),
    "int()": ("", "", "self.f_{n} = {N}", "int(self.f_{n})"),
    "index": ("", "", "self.f_{n} = {N}", "operator.index(self.f_{n})"),
    "len list": ("", "", "self.ll_{n} = [0] * {N}", "len(self.ll_{n})"),
    "modulelist": ("", "", "self.ml_{n} = nn.ModuleList(nn.Identity() for _ in range({N}))", "len(self.ml_{n})"),
    "paramsize": ("", "", "self.ps_{n} = nn.Parameter(torch.zeros({N}, 3))", "self.ps_{n}.shape[0]"),
    "width share": ("", "", "", "(self.a.weight.shape[0] * {N} // 16)"),
    "attr share": ("", "", "self.dim_{n} = 16", "(self.dim_{n} * {N} // 16)"),
    "attr parts": ("", "", "self.p_{n} = 16 // {N}", "(16 // self.p_{n})"),
    "attr parts2": ("", "", "self.p_{n} = 16 // {N}", "(self.a.weight.shape[0] // self.p_{n})"),
    "getattr": ("", "", "self.{n} = {N}", "getattr(self, '{n}')"),
    "__dict__": ("", "", "self.{n} = {N}", "self.__dict__['{n}']"),
    "vars": ("", "", "self.cfg_{n} = types.SimpleNamespace(k={N})", "vars(self.cfg_{n})['k']"),
    "closure fn": ("", "", "k_{n} = {N}\nself.fn_{n} = lambda: k_{n}", "self.fn_{n}()"),
    "partial": ("", "", "self.pt_{n} = functools.partial(ident, None, k={N})", "self.pt_{n}()"),
    "max": ("", "", "self.{n} = {N}", "max(1, self.{n})"),
    "or": ("", "", "self.{n} = {N}\nself.{n}_opt = None", "(self.{n}_opt or self.{n})"),
    "round": ("", "", "self.{n} = {N}", "round(self.{n})"),
    "math": ("", "", "self.{n} = {N}", "math.ceil(self.{n} / 1)"),
    "bool sum": ("", "", "self.{n} = {N}", "sum(1 for _ in range(self.{n}))"),
    "submodule": (
        "class Sub{n}(nn.Module):\n    def __init__(s): super().__init__(); s.k = {N}\n",
        "",
        "self.sub_{n} = Sub{n}()",
        "self.sub_{n}.k",
    ),
    "parent": ("", "", "self.box_{n} = [types.SimpleNamespace(k={N})]", "self.box_{n}[0].k"),
    "buffer shape": ("", "", "self.register_buffer('bs_{n}', torch.zeros({N}))", "self.bs_{n}.shape[0]"),
    "numel": ("", "", "self.register_buffer('bs_{n}', torch.zeros({N}))", "self.bs_{n}.numel()"),
}

# use -> (image or tokens, lines of the constructor, of the forward pass)
USES = {
    "group_norm": (
        "i",
        "self.w = nn.Parameter(torch.rand(16)+.5); self.b = nn.Parameter(torch.rand(16))",
        "y = F.group_norm(y, @4@, self.w, self.b)",
    ),
    "group_norm noaffine": (
        "i",
        "",
        "y = F.group_norm(y, num_groups=@4@)",
    ),
    "view groups": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.view(B, @4@, C // @4@, H, W)\ny = <y,2>\ny = y.view(B, C, H, W)"),
    ),
    "view groups -1": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.reshape(B, @4@, -1, H, W)\ny = <y,2>\ny = y.flatten(1, 2)"),
    ),
    "view -1 size": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.reshape(B, -1, @4@, H, W)\ny = <y,2>\ny = y.flatten(1, 2)"),
    ),
    "view both": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.reshape(B, @4@, @4b@, H, W)\ny = <y,1>\ny = y.flatten(1, 2)"),
    ),
    "view fold": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.reshape(B * @4@, -1, H, W)\ny = <y,1>\ny = y.reshape(B, -1, H, W)"),
    ),
    "view prod": (
        "i",
        "",
        ("B, C, H, W = y.shape\ny = y.reshape(B, @4@, @4b@, H, W)\ny = <y,2>\ny = y.reshape(B, @4@ * @4b@, H, W)"),
    ),
    "slice first": (
        "i",
        "",
        ("p, q = y[:, :@4@], y[:, @4@:]\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "slice last": (
        "i",
        "",
        ("p, q = y[:, :-@4@], y[:, -@4@:]\nq = <q,1>\ny = torch.cat([p, q], 1)"),
    ),
    "slice mid": (
        "i",
        "",
        ("p, q, r = y[:, :@4@], y[:, @4@:@12@], y[:, @12@:]\nq = <q,1>\ny = torch.cat([p, q, r], 1)"),
    ),
    "slice only": (
        "i",
        "self.e = nn.Conv2d(@4@, 16, 1)",
        ("p = y[:, :@4@]\ny = self.e(<p,1>)"),
    ),
    "slice strided": (
        "i",
        "",
        ("p = [y[:, i::@4@] for i in range(@4@)]\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "slice loop": (
        "i",
        "",
        ("p = [y[:, i * @4@:(i + 1) * @4@] for i in range(@4b@)]\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "narrow": (
        "i",
        "",
        ("p, q = y.narrow(1, 0, @4@), y.narrow(1, @4@, @12@)\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "narrow rest": (
        "i",
        "",
        ("p, q = y.narrow(1, 0, @4@), y.narrow(1, @4@, y.shape[1] - @4@)\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "split": (
        "i",
        "",
        ("p = y.split(@8@, 1)\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "split list": (
        "i",
        "",
        ("p, q = torch.split(y, [@4@, @12@], dim=1)\nq = <q,1>\ny = torch.cat([p, q], 1)"),
    ),
    "split rest": (
        "i",
        "",
        ("p, q = torch.split(y, [@4@, y.size(1) - @4@], dim=1)\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "chunk": (
        "i",
        "",
        ("p = y.chunk(@4@, 1)\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "tensor_split": (
        "i",
        "",
        ("p = torch.tensor_split(y, @4@, dim=1)\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "tensor_split at": (
        "i",
        "",
        ("p = torch.tensor_split(y, (@4@,), dim=1)\ny = torch.cat([<t,1> for t in p], 1)"),
    ),
    "unflatten": (
        "i",
        "",
        ("y = y.unflatten(1, (@4@, -1))\ny = <y,2>\ny = y.flatten(1, 2)"),
    ),
    "unflatten both": (
        "i",
        "",
        ("y = y.unflatten(1, (@4@, @4b@))\ny = <y,2>\ny = y.flatten(1, 2)"),
    ),
    "conv groups": (
        "i",
        "self.w = nn.Parameter(torch.randn(16, 4, 3, 3) * .3)",
        "y = F.conv2d(y, self.w, padding=1, groups=@4@).relu()",
    ),
    "depthwise": (
        "i",
        "self.w = nn.Parameter(torch.randn(16, 1, 3, 3) * .3)",
        "y = F.conv2d(y, self.w, padding=1, groups=@16@).relu()",
    ),
    "layer_norm": (
        "i",
        "self.w = nn.Parameter(torch.rand(16)+.5); self.b = nn.Parameter(torch.rand(16))",
        "y = F.layer_norm(y.permute(0, 2, 3, 1), (@16@,), self.w, self.b).permute(0, 3, 1, 2)",
    ),
    "rms_norm": (
        "i",
        "self.w = nn.Parameter(torch.rand(16)+.5)",
        "y = F.rms_norm(y.permute(0, 2, 3, 1), [@16@], self.w).permute(0, 3, 1, 2)",
    ),
    "shuffle": (
        "i",
        "self.g = nn.Conv2d(16, 16, 1, groups=4)",
        (
            "B, C, H, W = y.shape\n"
            "y = y.view(B, @4@, C // @4@, H, W).transpose(1, 2).reshape(B, C, H, W)\n"
            "y = self.g(y).relu()"
        ),
    ),
    "channel_shuffle": (
        "i",
        "self.g = nn.Conv2d(16, 16, 1, groups=4)",
        ("y = F.channel_shuffle(y, @4@)\ny = self.g(y).relu()"),
    ),
    "roll": (
        "i",
        "",
        "y = y.roll(@4@, 1)",
    ),
    "index list": (
        "i",
        "",
        ("p, q = y[:, list(range(@4@))], y[:, list(range(@4@, @16@))]\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "index arange": (
        "i",
        "",
        ("p, q = y[:, torch.arange(@4@)], y[:, torch.arange(@4@, @16@)]\np = <p,1>\ny = torch.cat([p, q], 1)"),
    ),
    "index_select": (
        "i",
        "",
        "y = y.index_select(1, torch.arange(@16@ - 1, -1, -1))",
    ),
    "pixel_shuffle": (
        "i",
        "self.e = nn.Conv2d(4, 16, 1)",
        "y = self.e(F.max_pool2d(F.pixel_shuffle(y, @2@), 2))",
    ),
    "pool groups": (
        "i",
        "self.e = nn.Conv2d(4, 16, 1)",
        ("B, C, H, W = y.shape\ny = self.e(y.view(B, @4@, -1, H, W).mean(2))"),
    ),
    "maxout": (
        "i",
        "self.e = nn.Conv2d(4, 16, 1)",
        ("B, C, H, W = y.shape\ny = self.e(y.view(B, @4@, C // @4@, H, W).amax(1))"),
    ),
    "expand": (
        "i",
        "self.w = nn.Parameter(torch.randn(16))",
        ("B, C, H, W = y.shape\ny = y + self.w.view(1, -1, 1, 1).expand(B, @16@, H, W)"),
    ),
    "mask zeros": (
        "i",
        "",
        ("m = torch.zeros(@16@, dtype=y.dtype)\nm[: @8@] = 1\ny = y * m[None, :, None, None]"),
    ),
    "mask zeros width": (
        "i",
        "",
        ("m = torch.zeros(y.shape[1], dtype=y.dtype)\nm[: @8@] = 1\ny = y * m[None, :, None, None]"),
    ),
    "mask half": (
        "i",
        "",
        ("d = y.shape[1]\nm = torch.zeros(d, dtype=y.dtype)\nm[: d // 2] = 1\ny = y * m[None, :, None, None]"),
    ),
    "mask arange": (
        "i",
        "",
        ("m = (torch.arange(@16@) < @8@).to(y)\ny = y * m[None, :, None, None]"),
    ),
    "mask arange width": (
        "i",
        "",
        ("m = (torch.arange(y.shape[1]) < @8@).to(y)\ny = y * m[None, :, None, None]"),
    ),
    "where": (
        "i",
        "",
        ("m = torch.arange(y.shape[1]) % @4@ == 0\ny = torch.where(m[:, None, None], y, y.relu())"),
    ),
    "assign slice": (
        "i",
        "",
        ("z = y.clone()\nz[:, :@4@] = z[:, :@4@].relu()\ny = z"),
    ),
    "assign stat": (
        "i",
        "",
        ("z = y.clone()\nz[:, :@4@] = <y[:, :@4@],1>\ny = z"),
    ),
    "inplace slice": (
        "i",
        "",
        ("y = y.clone()\ny[:, :@8@].mul_(2.0)"),
    ),
    "zero slice": (
        "i",
        "",
        ("y = y.clone()\ny[:, @8@:] = 0"),
    ),
    "pad": (
        "i",
        "self.e = nn.Conv2d(24, 16, 1)",
        ("y = F.pad(y, (0, 0, 0, 0, @4@, @4@))\ny = self.e(y)"),
    ),
    "pad slice": (
        "i",
        "",
        "y = F.pad(y, (0, 0, 0, 0, @4@, 0))[:, @4@:]",
    ),
    "cat zeros": (
        "i",
        "self.e = nn.Conv2d(20, 16, 1)",
        ("B, C, H, W = y.shape\ny = self.e(torch.cat([y, torch.zeros(B, @4@, H, W, dtype=y.dtype)], 1))"),
    ),
    "mean div": (
        "i",
        "",
        "y = y - y.sum(1, keepdim=True) / @16@",
    ),
    "mean div root": (
        "i",
        "",
        "y = y * (y.square().sum(1, keepdim=True) / @16@ + 1e-2).rsqrt()",
    ),
    "scale root": (
        "i",
        "",
        "y = (y * @16@ ** -0.5).relu()",
    ),
    "corr": (
        "i",
        "self.k = nn.Conv2d(3, 16, 1); self.e = nn.Conv2d(1, 16, 1)",
        ("k = self.k(x)\ny = self.e((y * k).sum(1, keepdim=True) / math.sqrt(@16@))"),
    ),
    "gqa": (
        "t",
        "self.k = nn.Linear(3, 8); self.v = nn.Linear(3, 8)",
        (
            "B, T, C = y.shape\n"
            "q = y.view(B, T, @4@, -1).transpose(1, 2)\n"
            "k, v = (m(x).view(B, T, @2@, -1).transpose(1, 2) for m in (self.k, self.v))\n"
            "k, v = (t.repeat_interleave(@4@ // @2@, 1) for t in (k, v))\n"
            "y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)"
        ),
    ),
    "attention": (
        "t",
        "self.q = nn.Linear(16, 48)",
        (
            "B, T, C = y.shape\n"
            "q, k, v = (t.reshape(B, T, @4@, -1).transpose(1, 2) for t in self.q(y).chunk(3, -1))\n"
            "y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, -1)"
        ),
    ),
    "attention packed": (
        "t",
        "self.q = nn.Linear(16, 48)",
        (
            "B, T, C = y.shape\n"
            "q, k, v = self.q(y).reshape(B, T, 3, @4@, -1).permute(2, 0, 3, 1, 4)\n"
            "y = ((q @ k.mT) * 4 ** -0.5).softmax(-1) @ v\n"
            "y = y.transpose(1, 2).reshape(B, T, -1)"
        ),
    ),
    "attention both": (
        "t",
        "self.q = nn.Linear(16, 48)",
        (
            "B, T, C = y.shape\n"
            "q, k, v = self.q(y).view(B, T, 3, @4@, @4b@).unbind(2)\n"
            "w = torch.einsum('bthd,bshd->bhts', q, k) / @4b@ ** 0.5\n"
            "y = torch.einsum('bhts,bshd->bthd', w.softmax(-1), v).flatten(2)"
        ),
    ),
    "attention split": (
        "t",
        "self.q = nn.Linear(16, 48)",
        (
            "B, T, C = y.shape\n"
            "q, k, v = self.q(y).split(@16@, -1)\n"
            "q, k, v = (t.unflatten(-1, (-1, @4@)).transpose(1, 2) for t in (q, k, v))\n"
            "y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)"
        ),
    ),
    "attention sizes": (
        "t",
        "self.q = nn.Linear(16, 48)",
        ("q, k, v = self.q(y).split([@16@, @16@, @16@], -1)\ny = F.scaled_dot_product_attention(q, k, v)"),
    ),
    "rotary half": (
        "t",
        "",
        (
            "a = torch.arange(1., 9.).to(y)[: @8@]\n"
            "p, q = y[..., :@8@], y[..., @8@:]\n"
            "y = torch.cat([p * a.cos() - q * a.sin(), q * a.cos() + p * a.sin()], -1)"
        ),
    ),
    "glu slice": (
        "t",
        "self.e = nn.Linear(8, 16)",
        "y = self.e(y[..., :@8@] * y[..., @8@:].sigmoid())",
    ),
    "glu split": (
        "t",
        "self.e = nn.Linear(8, 16)",
        ("u, v = y.split(@8@, -1)\ny = self.e(u * v.sigmoid())"),
    ),
    "block linear": (
        "t",
        "self.w = nn.Parameter(torch.randn(4, 4, 4))",
        ("B, T, C = y.shape\ny = torch.einsum('btgi,gij->btgj', y.view(B, T, @4@, -1), self.w).reshape(B, T, -1)"),
    ),
    "windows": (
        "t",
        "",
        ("y = y.unfold(-1, @4@, @4@)\ny = <y,-1>\ny = y.flatten(-2, -1)"),
    ),
    "conv1d depthwise": (
        "t",
        "self.w = nn.Parameter(torch.randn(16, 1, 3))",
        "y = F.conv1d(y.transpose(1, 2), self.w, padding=1, groups=@16@).transpose(1, 2).relu()",
    ),
    "eye": (
        "t",
        "",
        "y = y @ torch.eye(@16@, dtype=y.dtype)",
    ),
    "tril": (
        "t",
        "",
        "y = y @ torch.tril(torch.ones(@16@, @16@, dtype=y.dtype))",
    ),
    "one token view": (
        "t",
        "",
        ("B, T, C = y.shape\ny = y.reshape(B, T * @4@, -1)\ny = <y,-1>\ny = y.reshape(B, T, -1)"),
    ),
    "posenc": (
        "t",
        "",
        (
            "i = torch.arange(0, @16@, 2).to(y)\n"
            "p = torch.exp(-i / @16@)\n"
            "y = y + torch.stack([p.sin(), p.cos()], -1).flatten()"
        ),
    ),
    "seeded": (
        "t",
        "",
        "y = y * torch.randn(@16@, generator=torch.Generator().manual_seed(0), dtype=y.dtype)",
    ),
    "linspace": (
        "t",
        "",
        "y = y * torch.linspace(.1, 1, @16@, dtype=y.dtype)",
    ),
}
STATISTIC = "{t}.softmax({d})"
KNOWN = {"4b": 4}
"""Numbers of the same value that are held apart."""


def written(use, holder):
    """Return the code of a module with one use of numbers, all held in one way."""
    domain, fields, body = USES[use]
    above, inside, init, read = [], [], [], {}

    def put(found):
        key = found.group(1)
        if key not in read:
            value, name = str(KNOWN.get(key) or int(key)), f"n{key}"
            parts = [part.replace("{n}", name).replace("{N}", value) for part in HOLDERS[holder]]
            parts = [part.replace("{{", "{").replace("}}", "}") for part in parts]
            for lines, part in zip((above, inside, init), parts, strict=False):
                if part:
                    lines.append(part)
            read[key] = parts[3]
        return read[key]

    body = re.sub(r"<([^<>]+?),(-?\d)>", lambda m: STATISTIC.format(t=m.group(1), d=m.group(2)), body)
    body = re.sub(r"@(\d+b?)@", put, body)
    fields = re.sub(r"@(\d+)@", lambda m: m.group(1), fields)
    layers = ("nn.Conv2d(3, 16, 3, padding=1)", "nn.Conv2d(16, 5, 1)")
    if domain == "t":
        layers = ("nn.Linear(3, 16)", "nn.Linear(16, 5)")
    constructor = ["super().__init__()", f"self.a = {layers[0]}", fields, *dict.fromkeys(init), f"self.o = {layers[1]}"]
    lines = [*dict.fromkeys(above), "class Net(nn.Module):"]
    lines += [textwrap.indent(part, "    ") for part in dict.fromkeys(inside)]
    lines += ["    def __init__(self):", textwrap.indent("\n".join(filter(None, constructor)), "        ")]
    lines += ["    def forward(self, x):", "        y = self.a(x)", textwrap.indent(body, "        ")]
    return PRELUDE + "\n".join([*lines, "        return self.o(y)"])


def _network(use, holder):
    def make():
        space = {"__name__": "numbers"}
        exec(written(use, holder), space)
        return space["Net"]()

    return make


MISMATCHED = {
    ("narrow", "attr parts"), ("narrow", "attr parts2"), ("split list", "attr parts"), ("split list", "attr parts2"),
    ("split", "np"), ("glu split", "np"), ("attention split", "np"), ("assign stat", ""),
}  # fmt: skip
"""Pairs that torch does not run."""
SCALED = {"width share", "attr parts2"}
"""Holders that follow the width by themselves, so that a mean divided by them changes, and the report names it."""

for _use, (_domain, _, _) in USES.items():
    for _holder in HOLDERS:
        if (_use, _holder) not in MISMATCHED:
            _example = image() if _domain == "i" else tokens(width=3)
            _named = _use.startswith("mean div") and _holder in SCALED
            case("numbers", _example, f"{_use}, {_holder}", named=_named, dtype=torch.float64)(_network(_use, _holder))
