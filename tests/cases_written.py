"""Modules whose forward pass is one line of a table: operators, constants of channels, and numbers made from widths."""

from __future__ import annotations

from tests.cases import case, image, rows, tokens

PRELUDE = """
import math
import types

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, g):
        return g
"""


def network(fields, body):
    """Return what builds a network with these lines in its constructor and in its forward pass."""

    def make():
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in fields]
        lines += ["    def forward(self, x):", *(f"        {line}" for line in body)]
        space = {"__name__": "written"}
        exec(PRELUDE + "\n".join(lines), space)
        return space["Net"]()

    return make


# Operators that y, (B, 12, 6, 6), passes through: right cuts must not be refused.
OPERATORS = {
    "normalize": "y = F.normalize(y, dim=1)",
    "normalize p1": "y = F.normalize(y, p=1, dim=1)",
    "norm expand_as": "y = y / y.norm(dim=1, keepdim=True).expand_as(y)",
    "mean expand_as": "y = y - y.mean(1, keepdim=True).expand_as(y)",
    "expand": "y = y - y.mean(1, keepdim=True).expand(-1, y.shape[1], -1, -1)",
    "expand -1": "y = y - y.mean((2, 3), keepdim=True).expand(*y.shape)",
    "broadcast_to": "y = y - y.mean(1, keepdim=True).broadcast_to(y.shape)",
    "repeat": "y = y - y.mean(1, keepdim=True).repeat(1, y.shape[1], 1, 1)",
    "vector_norm": "y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True)",
    "unfold p1": "y = F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1)",
    "unfold p0": "y = F.fold(F.unfold(y, 3), (6, 6), 3)",
    "unfold view": ("B, C, H, W = y.shape\ny = F.unfold(y, 3, padding=1).view(B, C, 9, H, W).mean(2)"),
    "unfold view literal": ("B, C, H, W = y.shape\ny = F.unfold(y, 3, padding=1).view(B, 12, 9, H, W).mean(2)"),
    "unfold view -1": ("B, C, H, W = y.shape\ny = F.unfold(y, 3, padding=1).view(B, -1, 9, H, W).amax(2)"),
    "tensor unfold": ("y = y.unfold(2, 3, 1).mean(-1)\ny = F.pad(y, (0, 0, 1, 1))"),
    "channel_shuffle": "y = F.channel_shuffle(y, 3)",
    "ChannelShuffle": "y = self.cs(y)",
    "rfft2": "y = torch.fft.irfft2(torch.fft.rfft2(y), s=(6, 6))",
    "fft2": "y = torch.fft.ifft2(torch.fft.fft2(y)).real",
    "rfft weight": ("f = torch.fft.rfft2(y)\ny = torch.fft.irfft2(f * torch.view_as_complex(self.cw), s=(6, 6))"),
    "fftshift": "y = torch.fft.fftshift(torch.fft.fft2(y), (-2, -1)).abs()",
    "stft": (
        "B, C, H, W = y.shape\n"
        "z = torch.stft(y.flatten(2).flatten(0, 1), 8, return_complex=True, window=torch.ones(8,"
        " dtype=y.dtype)).abs().mean((1, 2))\n"
        "y = y * z.view(B, C, 1, 1)"
    ),
    "fno": (
        "f = torch.fft.rfft2(y)\n"
        "z = torch.zeros_like(f)\n"
        "z[:, :, :3, :3] = torch.einsum('bixy,ioxy->boxy', f[:, :, :3, :3], self.fw.to(f.dtype))\n"
        "y = torch.fft.irfft2(z, s=(6, 6))"
    ),
    "scatter_add pos": "y = torch.zeros_like(y).scatter_add(2, torch.zeros_like(y).long(), y)",
    "scatter_reduce": "y = torch.zeros_like(y).scatter_reduce(2, torch.zeros_like(y).long(), y, 'amax')",
    "scatter pos": "y = torch.zeros_like(y).scatter(3, torch.arange(6).expand(y.shape).flip(3).contiguous(), y)",
    "gather pos": "y = y.gather(3, torch.arange(6).flip(0).expand(y.shape))",
    "index_add": ("z = y.flatten(2)\ny = torch.zeros_like(z).index_add(2, torch.arange(36) // 2, z).view_as(y)"),
    "index_put acc": (
        "z = y.flatten(2).permute(2, 0, 1)\n"
        "y = torch.zeros_like(z).index_put((torch.arange(36) // 2,), z, accumulate=True).permute(1, 2,"
        " 0).reshape(y.shape)"
    ),
    "index_reduce": (
        "z = y.flatten(2)\ny = torch.zeros_like(z).index_reduce(2, torch.arange(36) // 2, z, 'mean').view_as(y)"
    ),
    "segment mean": (
        "z = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])\n"
        "i = torch.arange(z.shape[0]) // 4\n"
        "n = torch.zeros(z.shape[0], 1, dtype=z.dtype).index_add(0, i, torch.ones(z.shape[0], 1,"
        " dtype=z.dtype)).clamp(1)\n"
        "z = torch.zeros_like(z).index_add(0, i, z) / n\n"
        "y = z[i].view(y.shape[0], 6, 6, -1).permute(0, 3, 1, 2)"
    ),
    "sparse mm": (
        "B, C, H, W = y.shape\n"
        "A = torch.eye(36, dtype=y.dtype).roll(1, 0).to_sparse()\n"
        "z = y.permute(2, 3, 0, 1).reshape(36, -1)\n"
        "y = torch.sparse.mm(A, z).view(H, W, B, C).permute(2, 3, 0, 1)"
    ),
    "sparse @": (
        "B, C, H, W = y.shape\n"
        "A = torch.eye(36, dtype=y.dtype).to_sparse()\n"
        "z = y.permute(2, 3, 0, 1).reshape(36, -1)\n"
        "y = (A @ z).view(H, W, B, C).permute(2, 3, 0, 1)"
    ),
    "sparse csr": (
        "B, C, H, W = y.shape\n"
        "A = torch.eye(36, dtype=y.dtype).to_sparse_csr()\n"
        "z = y.permute(2, 3, 0, 1).reshape(36, -1)\n"
        "y = (A @ z).view(H, W, B, C).permute(2, 3, 0, 1)"
    ),
    "cdist pos": ("z = y.flatten(2).mT\nd = torch.cdist(z, z)\ny = (d.softmax(-1) @ z).mT.reshape(y.shape)"),
    "cdist 3d small": (
        "z = y.flatten(2)[:, :, :5].mT\n"
        "d = torch.cdist(z, z, compute_mode='donot_use_mm_for_euclid_dist')\n"
        "y = y * d.mean()"
    ),
    "cdist codebook": (
        "z = y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])\n"
        "d = torch.cdist(z, self.code)\n"
        "q = self.code[d.argmin(1)]\n"
        "y = q.view(y.shape[0], 6, 6, -1).permute(0, 3, 1, 2)"
    ),
    "pairwise": "y = y * F.pairwise_distance(y.flatten(2).mT, y.flatten(2).flip(2).mT).view(y.shape[0], 1, 6, 6)",
    "cosine": "y = y * F.cosine_similarity(y, y.flip(2), 1)[:, None]",
    "fake_quant": "y = torch.fake_quantize_per_tensor_affine(y, 0.1, 0, 0, 255)",
    "mse": "y = y * F.mse_loss(y, y * 2)",
    "l1": "y = y * F.smooth_l1_loss(y, y * 2)",
    "kl": "y = y * F.kl_div(y.log_softmax(1), y.softmax(1), reduction='batchmean')",
    "unpool": "y = F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2)",
    "grid_sample": (
        "g = F.affine_grid(torch.eye(2, 3, dtype=y.dtype).expand(y.shape[0], 2, 3), y.shape,"
        " align_corners=False)\n"
        "y = F.grid_sample(y, g, align_corners=False)"
    ),
    "interpolate": "y = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode='bilinear')",
    "interp size": "y = F.interpolate(F.avg_pool2d(y, 2), size=y.shape[2:], mode='nearest')",
    "adaptive": "y = y * F.adaptive_avg_pool2d(y, 1)",
    "lp_pool": "y = F.interpolate(F.lp_pool2d(y, 2, 2), scale_factor=2)",
    "roll pos": "y = y.roll((1, 1), (2, 3))",
    "flip pos": "y = y.flip(3)",
    "rot90": "y = y.rot90(1, (2, 3))",
    "cumsum pos": "y = y.cumsum(3)",
    "topk pos": "y = y.flatten(2).topk(36, -1)[0].view_as(y)",
    "sort pos": "y = y.flatten(2).sort(-1)[0].view_as(y)",
    "kthvalue pos": "y = y - y.flatten(2).kthvalue(3, -1)[0][:, :, None, None]",
    "median pos": "y = y - y.flatten(2).median(-1)[0][:, :, None, None]",
    "einsum": "y = torch.einsum('bchw,cd->bdhw', y, self.m)",
    "tensordot": "y = torch.tensordot(y, self.m, ([1], [0])).permute(0, 3, 1, 2)",
    "bilinear": (
        "y = F.bilinear(y.permute(0, 2, 3, 1).contiguous(), y.permute(0, 2, 3, 1).contiguous(),"
        " self.bl).permute(0, 3, 1, 2)"
    ),
    "gram": ("f = y.flatten(2)\ny = (f @ f.mT).softmax(-1) @ f\ny = y.view(x.shape[0], -1, 6, 6)"),
    "solve pos": ("K = torch.eye(6, dtype=y.dtype) * 2\ny = torch.linalg.solve(K, y)"),
    "matrix_exp": "y = y + torch.matrix_exp(y * 0.01)",
    "svd pos": "y = y * torch.linalg.svdvals(y)[..., :1, None]",
    "inverse": "y = torch.linalg.inv(y + 9 * torch.eye(6, dtype=y.dtype))",
    "qr": "y = torch.linalg.qr(y + torch.eye(6, dtype=y.dtype))[0]",
    "det": "y = y * torch.linalg.det(y)[..., None, None].tanh()",
    "searchsorted": ("y = torch.searchsorted(torch.linspace(0, 1, 5, dtype=y.dtype), y.contiguous()).to(y.dtype) + y"),
    "bucketize": "y = y + torch.bucketize(y, torch.linspace(0, 1, 5, dtype=y.dtype)).to(y.dtype)",
    "polar": ("z = torch.polar(y, y)\ny = z.real + z.imag"),
    "complex": ("z = torch.complex(y, -y)\ny = (z * z.conj()).real"),
    "view_as_complex": (
        "B, C, H, W = y.shape\n"
        "z = torch.view_as_complex(y.view(B, C, H, 3, 2))\n"
        "y = torch.view_as_real(z * torch.polar(torch.ones(3, dtype=y.dtype),"
        " torch.arange(3).to(y))).flatten(3)"
    ),
    "per-sample conv": (
        "B, C, H, W = y.shape\n"
        "k = y.mean((2, 3)).view(B * C, 1, 1, 1)\n"
        "y = F.conv2d(y.reshape(1, B * C, H, W), k, groups=B * C).view(B, C, H, W)"
    ),
    "layer_norm dim": "y = F.layer_norm(y.permute(0, 2, 3, 1), (self.dim,), self.lw, self.lb).permute(0, 3, 1, 2)",
    "layer_norm shape attr": (
        "y = F.layer_norm(y.permute(0, 2, 3, 1), self.shape, self.lw, self.lb).permute(0, 3, 1, 2)"
    ),
    "layer_norm [C,H,W]": "y = F.layer_norm(y, y.shape[1:], self.lwc)",
    "layer_norm list": "y = F.layer_norm(y, [self.dim, 6, 6], self.lwc)",
    "layer_norm weight.shape": ("y = F.layer_norm(y.permute(0, 2, 3, 1), self.lw.shape, self.lw).permute(0, 3, 1, 2)"),
    "conv groups dim": "y = F.conv2d(y, self.w, padding=1, groups=self.dim)",
    "conv groups shape": "y = F.conv2d(y, self.w, padding=1, groups=y.shape[1])",
    "conv groups weight": "y = F.conv2d(y, self.w, padding=1, groups=self.w.shape[0])",
    "conv g": "y = F.conv2d(y, self.gw, groups=self.g)",
    "conv1d dw over positions": ("y = F.conv1d(y.flatten(2), self.w[:, :, 0], padding=1, groups=self.dim).view_as(y)"),
    "blur": (
        "k = torch.tensor([1.0, 2.0, 1.0]).to(y)\n"
        "k = (k[:, None] * k[None])[None, None].repeat(y.shape[1], 1, 1, 1) / 16\n"
        "y = F.conv2d(y, k, padding=1, groups=y.shape[1])"
    ),
    "blur expand": (
        "k = torch.ones(1, 1, 3, 3, dtype=y.dtype).expand(y.size(1), -1, -1, -1) / 9\n"
        "y = F.conv2d(y, k, padding=1, groups=y.size(1))"
    ),
    "blur attr": (
        "k = torch.ones(self.dim, 1, 3, 3, dtype=y.dtype) / 9\ny = F.conv2d(y, k, padding=1, groups=self.dim)"
    ),
    "instance_norm": "y = F.instance_norm(y, weight=self.lw, bias=self.lb)",
    "batch_norm": "y = F.batch_norm(y, self.lb.detach(), self.lw.detach(), self.lw, self.lb)",
    "prelu": "y = F.prelu(y - 0.5, self.lw)",
    "rrelu": "y = F.rrelu(y - 0.5, training=self.training)",
    "glu cat": "y = F.glu(torch.cat([y, -y], 1), 1)",
    "alpha dropout": "y = F.alpha_dropout(y, 0.1, self.training)",
    "feature dropout": "y = F.feature_alpha_dropout(y, 0.1, self.training)",
    "checkpoint": "y = torch.utils.checkpoint.checkpoint(self.sq, y, use_reentrant=False)",
    "checkpoint reentrant": "y = torch.utils.checkpoint.checkpoint(self.sq, y, use_reentrant=True)",
    "vmap": "y = torch.vmap(lambda t: t * t.mean(0))(y)",
    "autograd grad": (
        "with torch.enable_grad():\n"
        "    z = y.detach().requires_grad_()\n"
        "    g, = torch.autograd.grad(z.square().sum(), z)\n"
        "y = g"
    ),
    "custom function": "y = Clamped.apply(y)",
    "jvp": "y = torch.func.jvp(lambda t: t.square(), (y,), (torch.ones_like(y),))[1]",
    "nan_to_num": "y = y.nan_to_num()",
    "isnan any": "y = y if not torch.isnan(y).any() else y * 0",
    "lerp": "y = torch.lerp(y, -y, self.lw[:, None, None])",
    "where scalar": "y = torch.where(y > 0.2, y, torch.zeros((), dtype=y.dtype))",
    "masked_select skip": "y = y.masked_fill(y > 1, 0.0)",
    "trapz": "y = y * torch.trapezoid(y, dim=3)[..., None]",
    "pad reflect": "y = F.pad(y, (1, 1, 1, 1), mode='reflect')[:, :, 1:-1, 1:-1]",
    "pixel_unshuffle": "y = F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2)",
    "multinomial": "y = y + 0 * torch.multinomial(torch.ones(4), 1).to(y)",
    "lstm pos": ("z = self.rnn(y.flatten(2).mT)[0].mT\ny = y + z.reshape(y.shape)"),
    "mha": ("z = self.mha(*[y.flatten(2).mT] * 3)[0].mT\ny = y + z.reshape(y.shape)"),
    "inplace ops": "y.mul_(2).add_(1).clamp_(0, 3)",
    "setitem pos": ("y = y.clone()\ny[:, :, 0] = 0"),
    "setitem feat": ("z = torch.zeros_like(y)\nz[:, :, 1:] = y[:, :, :-1]\ny = z"),
    "out=": ("z = torch.empty_like(y)\ntorch.mul(y, 2, out=z)\ny = z"),
    "as_strided": ("y = y.contiguous()\ny = y.as_strided(y.shape, y.stride())"),
    "tolist": "y = y * (1 if y.sum().tolist() > -1000000000.0 else 2)",
    "movedim": "y = y.movedim(1, -1).movedim(-1, 1)",
    "squeeze": "y = y[:, :, None].squeeze(2)",
    "channels_last": "y = y.to(memory_format=torch.channels_last)",
    "stack mean": "y = torch.stack([y, y * 2, -y]).mean(0)",
    "moving std": "y = (y - y.mean((2, 3), keepdim=True)) / torch.std(y, (2, 3), keepdim=True)",
    "logsumexp": "y = y - y.logsumexp(1, keepdim=True)",
    "bmm": ("z = y.flatten(2)\ny = torch.bmm(torch.bmm(z, z.mT), z).view_as(y)"),
    "addcdiv": "y = torch.addcdiv(y, y, y + 1)",
    "scaled sdpa": (
        "z = y.flatten(2).mT[:, None]\ny = F.scaled_dot_product_attention(z, z, z)[:, 0].mT.reshape(y.shape)"
    ),
    "amin amax": "y = (y - y.amin(1, keepdim=True)) / (y.amax(1, keepdim=True) - y.amin(1, keepdim=True) + 0.1)",
    "aminmax": ("lo, hi = torch.aminmax(y)\ny = (y - lo) / (hi - lo)"),
    "var_mean": ("v, m = torch.var_mean(y, 1, keepdim=True)\ny = (y - m) / (v + 0.1).sqrt()"),
    "count_nonzero": "y = y / (y.count_nonzero(dim=(2, 3))[..., None, None] + 1)",
    "any": "y = y * (y > 0.5).any(1, keepdim=True)",
}
MODULES = {
    "ChannelShuffle": "self.cs = nn.ChannelShuffle(3)",
    "rfft weight": "self.cw = nn.Parameter(torch.randn(12, 6, 4, 2))",
    "fno": "self.fw = nn.Parameter(torch.randn(12, 12, 3, 3))",
    "cdist codebook": "self.code = nn.Parameter(torch.randn(40, 12))",
    "einsum": "self.m = nn.Parameter(torch.randn(12, 12))",
    "tensordot": "self.m = nn.Parameter(torch.randn(12, 12))",
    "bilinear": "self.bl = nn.Parameter(torch.randn(12, 12, 12) * .1)",
    "checkpoint": "self.sq = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU())",
    "checkpoint reentrant": "self.sq = nn.Sequential(nn.Conv2d(12, 12, 1), nn.ReLU())",
    "lstm pos": "self.rnn = nn.LSTM(12, 12, batch_first=True)",
    "mha": "self.mha = nn.MultiheadAttention(12, 3, batch_first=True)",
}
"""Further lines of the constructor."""
RANDOM = {"rrelu", "alpha dropout", "feature dropout", "multinomial"}
"""Operators that draw random numbers in train mode."""
WHOLE = {"unfold view literal", "solve pos", "jvp"}
"""Operators that are refused: a number in the code counts all channels, or an operator has no rule."""
_CENTRED = "y = y - y.mean(1, keepdim=True)"
REFERENCES = {
    "norm expand_as": "y = y / y.norm(dim=1, keepdim=True)",
    "mean expand_as": _CENTRED,
    "expand": _CENTRED,
    "broadcast_to": _CENTRED,
    "repeat": _CENTRED,
    "vmap": "y = y * y.mean(1, keepdim=True)",
    "mse": "y = y * (y - y * 2).square().mean()",
    "l1": "d = (y - y * 2).abs()\ny = y * torch.where(d < 1, d * d / 2, d - .5).mean()",
    "cosine": "z = y.flip(2)\ny = y * ((y * z).sum(1) / (y.norm(dim=1) * z.norm(dim=1)))[:, None]",
}
"""The same in words that the oracle can follow."""


def _register_operators():
    fields = [
        "self.a, self.o = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)",
        "self.dim, self.g, self.shape = 12, 3, (12,)",
        "self.w, self.gw = nn.Parameter(torch.randn(12, 1, 3, 3)), nn.Parameter(torch.randn(12, 4, 1, 1))",
        "self.lw, self.lb = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))",
        "self.lwc = nn.Parameter(torch.rand(12, 6, 6))",
    ]
    for name, code in OPERATORS.items():
        own = [*fields, MODULES.get(name, "pass")]
        make, other = (
            network(own, ["y = self.a(x).relu() + .1", *lines.split("\n"), "return self.o(y)"])
            for lines in (code, REFERENCES.get(name, code))
        )
        most = {} if name in WHOLE else {"a.weight": 6}
        fresh = image(2, seed=9) if name.startswith("sparse") else None
        case(
            "operators", image(), f"operator {name}", most=most, fresh=fresh, train=name not in RANDOM,
            named=name == "scaled sdpa", reference=other if name in REFERENCES else None,
        )(make)  # fmt: skip


# Constants of the channels of y, (B, d), made in the code.
CONSTANTS = {
    "zeros half": ("m = torch.zeros(d, dtype=y.dtype)\nm[:d // 2] = 1\ny = y * m"),
    "zeros half attr": ("m = torch.zeros(self.d, dtype=y.dtype)\nm[:self.h] = 1\ny = y * m"),
    "zeros last": ("m = torch.zeros(d, dtype=y.dtype)\nm[-d // 4:] = 1\ny = y * m"),
    "zeros step": ("m = torch.zeros(d, dtype=y.dtype)\nm[::2] = 1\ny = y * m"),
    "zeros quarter literal": ("m = torch.zeros(d, dtype=y.dtype)\nm[4:8] = 1\ny = y * m"),
    "ones then zero": ("m = torch.ones_like(y)\nm[..., d // 2:] = 0\ny = y * m"),
    "zeros_like row": ("m = torch.zeros_like(y[0])\nm[:4] = 1.0\ny = y * m"),
    "new_zeros idx": ("m = y.new_zeros(d)\nm[torch.arange(0, d, 2)] = 1\ny = y * m"),
    "index_fill": ("m = torch.zeros(d, dtype=y.dtype).index_fill(0, torch.arange(d // 2), 1.0)\ny = y * m"),
    "fill_ slice": ("m = torch.zeros(d, dtype=y.dtype)\nm[:d // 2].fill_(1.0)\ny = y * m"),
    "cat": "y = y * torch.cat([torch.ones(d // 2), torch.zeros(d - d // 2)]).to(y)",
    "cat literal": "y = y * torch.cat([torch.ones(4), torch.zeros(d - 4)]).to(y)",
    "tril row": "y = y * torch.ones(d, d, dtype=y.dtype).tril()[d // 2]",
    "cumsum": "y = y * (torch.ones(d, dtype=y.dtype).cumsum(0) / d)",
    "arange": "y = y * torch.arange(d).to(y)",
    "arange lt": "y = y * (torch.arange(d) < d // 2)",
    "arange mod": "y = y * (torch.arange(d) % 2).to(y)",
    "linspace": "y = y * torch.linspace(0, 1, d, dtype=y.dtype)",
    "logspace": "y = y * torch.logspace(0, 1, d, dtype=y.dtype)",
    "eye row": "y = y * torch.eye(d, dtype=y.dtype)[0]",
    "eye": "y = y @ torch.eye(d, dtype=y.dtype)",
    "hann": "y = y * torch.hann_window(d, dtype=y.dtype)",
    "hamming": "y = y * torch.hamming_window(d, dtype=y.dtype)",
    "seed gen": "y = y * torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=y.dtype)",
    "seed global": (
        "st = torch.get_rng_state()\n"
        "torch.manual_seed(0)\n"
        "k = torch.randn(d, dtype=y.dtype)\n"
        "torch.set_rng_state(st)\n"
        "y = y * k"
    ),
    "fork seed": (
        "with torch.random.fork_rng():\n    torch.manual_seed(1)\n    k = torch.rand(d, dtype=y.dtype)\ny = y + k"
    ),
    "randperm": "y = y[:, torch.randperm(d, generator=torch.Generator().manual_seed(0))]",
    "np seed": "y = y * torch.from_numpy(np.random.RandomState(0).rand(d)).to(y)",
    "np arange": "y = y * torch.from_numpy(np.arange(d)).to(y)",
    "python list": "y = y * torch.tensor([float(i) for i in range(d)], dtype=y.dtype)",
    "as_tensor": "y = y * torch.as_tensor([1.0 if i < d // 2 else 0.0 for i in range(d)], dtype=y.dtype)",
    "bernoulli seed": (
        "y = y * torch.bernoulli(torch.full((d,), 0.5, dtype=y.dtype), generator=torch.Generator().manual_seed(0))"
    ),
    "hadamard": (
        "h = torch.ones(1, 1, dtype=y.dtype)\n"
        "while h.shape[0] < d:\n"
        "    h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)\n"
        "y = y @ h[:d, :d]"
    ),
    "dct": ("i = torch.arange(d, dtype=y.dtype)\ny = y @ torch.cos(math.pi / d * (i[:, None] + 0.5) * i[None])"),
    "dft": "y = torch.fft.fft(y).real",
    "sign alternating": "y = y * torch.tensor([1.0, -1.0], dtype=y.dtype).repeat(d // 2)",
    "repeat_interleave": "y = y * torch.tensor([1.0, 2.0], dtype=y.dtype).repeat_interleave(d // 2)",
    "tensor attr mask": "y = y * self.m.to(y)",
    "buffer mask": "y = y * self.bm.to(y)",
    "index attr list": "y = torch.cat([y[:, self.idx], y[:, [i + 1 for i in self.idx]]], 1)",
    "index buffer": "y = y[:, self.bi]",
    "index tensor attr": "y = y[:, self.ti]",
    "where arange": "y = torch.where(torch.arange(d) < 8, y, y.relu())",
    "masked_fill": "y = y.masked_fill(torch.arange(d) > d // 2, 0.0)",
    "scatter mask": "y = y * torch.zeros(d, dtype=y.dtype).scatter(0, torch.arange(0, d, 2), 1.0)",
    "one_hot": "y = y * F.one_hot(torch.tensor(3), d).to(y)",
    "triu sum": "y = y + torch.ones(d, d, dtype=y.dtype).triu().sum(0) * 0.01",
    "meshgrid": "y = y * torch.meshgrid(torch.arange(d), torch.arange(2), indexing='ij')[0][:, 0].to(y)",
    "outer": "y = y @ torch.outer(torch.arange(d), torch.arange(d)).to(y) * 0.01",
    "bincount": "y = y * torch.bincount(torch.arange(d) % 3, minlength=d).to(y)",
    "stack": "y = y * torch.stack([torch.tensor(float(i)) for i in range(d)]).to(y)",
    "diag": "y = y @ torch.diag(torch.arange(d).to(y))",
    "from param": "y = y * (self.k > 0.5).to(y)",
    "argsort param": "y = y * self.k.argsort().to(y)",
    "sort param": "y = y * self.k.sort()[0]",
    "topk param": ("m = torch.zeros_like(self.k)\nm[self.k.topk(4)[1]] = 1\ny = y * m"),
    "flip": "y = y + y.flip(-1)",
    "roll1": "y = y + y.roll(1, -1)",
    "diff": "y = F.pad(y.diff(dim=-1), (1, 0))",
    "shift cat": "y = y + torch.cat([y[:, 1:], y[:, :1]], 1)",
    "shift pad": "y = y + F.pad(y[:, :-1], (1, 0))",
    "ema": "y = y.cumsum(-1) / torch.arange(1, d + 1).to(y)",
    "conv over channels": "y = F.conv1d(y[:, None], torch.ones(1, 1, 3, dtype=y.dtype), padding=1)[:, 0]",
    "eca": "y = y * F.avg_pool1d(y[:, None], 3, 1, 1)[:, 0].sigmoid()",
    "lrn": "y = F.local_response_norm(y[:, :, None], 5)[:, :, 0]",
    "sort": "y = y.sort(-1)[0]",
    "topk mask": ("m = torch.zeros_like(y).scatter(1, y.topk(4, 1)[1], 1.0)\ny = y * m"),
    "kthvalue": "y = y * (y >= y.kthvalue(d // 2, -1, keepdim=True)[0])",
    "median": "y = y - y.median(-1, keepdim=True)[0]",
    "argmax onehot": "y = y * F.one_hot(y.argmax(-1), d)",
    "groupsort": "y = y.view(-1, d // 2, 2).sort(-1)[0].flatten(1)",
    "maxmin": ("a, b = y.split(d // 2, 1)\ny = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)"),
    "crelu": ("y = torch.cat([y, -y], 1).relu()\ny = y[:, :d] + y[:, d:]"),
    "quantile": "y = y - y.quantile(0.5, dim=-1, keepdim=True)",
    "std corr": "y = y / (y.std(-1, keepdim=True) + 1)",
    "logcumsumexp": "y = y.logcumsumexp(-1)",
    "cummax": "y = y.cummax(-1)[0]",
    "outer self": "y = (y[:, :, None] * y[:, None, :]).mean(-1)",
    "householder": ("v = self.k / self.k.norm()\ny = y - 2 * (y @ v)[:, None] * v"),
    "whiten": ("c = y.t() @ y / len(y) + torch.eye(d, dtype=y.dtype)\ny = torch.linalg.solve(c, y.t()).t()"),
    "chol": ("c = y.t() @ y + torch.eye(d, dtype=y.dtype)\ny = y @ torch.linalg.cholesky(c)"),
    "det": "y = y * torch.linalg.det(y.t() @ y + torch.eye(d, dtype=y.dtype)).tanh()",
    "svd": "y = y / torch.linalg.matrix_norm(y, 2)",
}


def _register_constants():
    fields = [
        "self.a, self.o, self.d, self.h = nn.Linear(8, 16), nn.Linear(16, 5), 16, 8",
        "self.k, self.m = nn.Parameter(torch.rand(16)), (torch.arange(16) < 8).float()",
        "self.register_buffer('bm', (torch.arange(16) < 8).float(), persistent=False)",
        "self.register_buffer('bi', torch.randperm(16))",
        "self.idx, self.ti = list(range(0, 16, 2)), torch.arange(15, -1, -1)",
    ]
    for name, code in CONSTANTS.items():
        body = ["y = self.a(x)", "d = y.shape[-1]", *code.split("\n"), "return self.o(y)"]
        case("constants", rows(), f"constant {name}")(network(fields, body))


# A number made from the head width d of q, and where it scales the scores of attention.
NUMBERS = {
    "pow": "q.shape[-1] ** -0.5",
    "pow2": "1 / q.shape[-1] ** 0.5",
    "sqrt": "1 / math.sqrt(q.shape[-1])",
    "size": "q.size(-1) ** -.5",
    "np": "1 / float(np.sqrt(q.shape[-1]))",
    "npf": "1 / np.sqrt(q.size(-1))",
    "tensor": "torch.tensor(q.shape[-1], dtype=q.dtype).rsqrt()",
    "tensor sqrt": "1 / torch.sqrt(torch.tensor(float(q.shape[-1])).to(q))",
    "full": "torch.full((1,), float(q.shape[-1]), dtype=q.dtype).pow(-.5)",
    "newfull": "q.new_full((), q.shape[-1]) ** -.5",
    "exp": "math.exp(-.5 * math.log(q.shape[-1]))",
    "attr": "self.dk ** -.5",
    "stored": "self.scale",
    "buffer": "self.bscale",
    "attr sqrt": "1 / math.sqrt(self.dk)",
    "cfg": "self.cfg.dk ** -.5",
    "heads": "(16 / self.h) ** -.5",
    "width//heads": "(x.shape[-1] // self.h) ** -.5",
    "literal": "0.5",
    "weight": "self.qk.weight.shape[0] ** -.5",
    "numel": "(q.numel() / q.shape[0] / q.shape[1] / q.shape[2]) ** -.5",
    "len": "len(q[0, 0, 0]) ** -.5",
    "int": "int(q.shape[-1]) ** -.5",
    "double scale": "q.shape[-1] ** -.25 * k.shape[-1] ** -.25",
    "log": "1 / math.log2(q.shape[-1] * 4)",
    "isqrt": "1 / math.isqrt(q.shape[-1])",
    "fraction": "1 / (q.shape[-1] + 1)",
    "sumones": "torch.ones(q.shape[-1], dtype=q.dtype).sum() ** -.5",
    "arange": "(torch.arange(q.shape[-1]).max() + 1).to(q.dtype) ** -.5",
    "norm": "1 / torch.ones(q.shape[-1], dtype=q.dtype).norm()",
}
PLACES = {
    "scores *": "w = q @ k.mT * {number}",
    "q *": ("q = q * {number}\nw = q @ k.mT"),
    "scores /": "w = q @ k.mT / (1 / {number})",
    "k *": "w = q @ (k * {number}).mT",
    "baddbmm": (
        "w = torch.baddbmm(torch.zeros(1, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT,"
        " alpha=float({number})).view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])"
    ),
    "einsum": "w = torch.einsum('bhtd,bhsd->bhts', q, k).mul({number})",
    "sdpa": "w = None\ny = F.scaled_dot_product_attention(q, k, v, scale=float({number}))",
    "inplace": ("w = q @ k.mT\nw *= {number}"),
    "mul_": "w = (q @ k.mT).mul_({number})",
    "softmax T": ("w = q @ k.mT\nw = w / (1 / {number} + 0)"),
    "sub": "w = q @ k.mT * {number} - (q @ k.mT * {number}).amax(-1, keepdim=True)",
    "true_divide": "w = torch.true_divide(q @ k.mT, 1 / {number})",
}
KEPT = {"full", "newfull", "arange", "baddbmm"}
"""Numbers and places that are refused, since their scale cannot be compensated."""


def _register_roots():
    fields = [
        "self.h, self.dk, self.scale, self.cfg = 4, 4, .5, types.SimpleNamespace(dk=4)",
        "self.register_buffer('bscale', torch.tensor(.5))",
        "self.e, self.qk, self.v, self.o = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 5)",
    ]
    pairs = [(number, "scores *") for number in NUMBERS]
    pairs += [(number, place) for number in ("pow", "attr", "tensor", "np") for place in PLACES if place != "scores *"]
    for number, place in pairs:
        body = [
            "x = self.e(x)",
            "q, k = self.qk(x).chunk(2, -1)",
            "q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, self.v(x)))",
            "y = None",
            *PLACES[place].format(number=NUMBERS[number]).split("\n"),
            "y = w.softmax(-1) @ v if y is None else y",
            "return self.o(y.transpose(1, 2).flatten(2))",
        ]
        most = {} if {number, place} & KEPT else {"qk.weight": 16}
        made = network(fields, body)
        case(
            "widths",
            tokens(),
            f"{number} in {place}",
            ignore=["e"],
            most=most,
            named=number == "double scale" or place in ("sub", "sdpa", "baddbmm"),
        )(made)


_register_operators()
_register_constants()
_register_roots()
