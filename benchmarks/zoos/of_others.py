"""Networks that people write themselves or take from smaller libraries, with random weights; prunes nothing.

The transformers, the Fourier operator and the GAN are written here from their papers. Graph networks need
``torch_geometric``, YOLOv8 needs ``ultralytics`` (with ``opencv-python-headless``).
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["NETWORKS", "build", "names"]

VOCABULARY = 200


# --- LLaMA as its authors released it: rotary embedding by complex numbers, keys and values repeated for the heads


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # the statistic is computed in float32 whatever the model's precision
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotations(width: int, length: int) -> Tensor:
    """Return unit complex numbers, one per position and pair of channels, ``(length, width / 2)``."""
    speeds = 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), speeds)
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, by: Tensor) -> Tensor:
    """Rotate neighbouring channels as the two parts of complex numbers, ``(N, T, heads, width)``."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    shape = [size if d in (1, pairs.dim() - 1) else 1 for d, size in enumerate(pairs.shape)]
    return torch.view_as_real(pairs * by.view(*shape)).flatten(3).type_as(x)


def repeated(x: Tensor, times: int) -> Tensor:
    """Repeat each head of keys or values, ``(N, T, heads, width)`` to ``(N, T, heads * times, width)``."""
    if times == 1:
        return x
    n, length, heads, width = x.shape
    return x[:, :, :, None, :].expand(n, length, heads, times, width).reshape(n, length, heads * times, width)


class GroupedQueryAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = heads, kv_heads
        self.n_rep = heads // kv_heads
        self.head_dim = dim // heads
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, by: Tensor, mask: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.wq(x).view(n, length, self.n_heads, self.head_dim)
        k = self.wk(x).view(n, length, self.n_kv_heads, self.head_dim)
        v = self.wv(x).view(n, length, self.n_kv_heads, self.head_dim)
        q, k = rotated(q, by), rotated(k, by)
        k, v = repeated(k, self.n_rep), repeated(v, self.n_rep)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.transpose(2, 3) / self.head_dim**0.5 + mask
        out = F.softmax(scores.float(), dim=-1).type_as(q) @ v
        return self.wo(out.transpose(1, 2).contiguous().view(n, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = GroupedQueryAttention(dim, heads=4, kv_heads=2)
        self.feed_forward = SwiGLU(dim, 176)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, by: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), by, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class ReferenceLlama(nn.Module):
    """LLaMA, Touvron et al. 2023 (arXiv:2302.13971), with the grouped queries of LLaMA 2 (arXiv:2307.09288)."""

    def __init__(self, dim: int = 64, layers: int = 2, longest: int = 64) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, VOCABULARY, bias=False)
        self.freqs_cis = rotations(dim // 4, longest)  # a plain attribute, not a buffer

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tok_embeddings(tokens)
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, self.freqs_cis[:length], mask)
        return self.output(self.norm(x))


# --- GPTs whose code names the number of heads in different ways


class FusedAttention(nn.Module):
    """Attention from one projection; ``reads`` says where its code takes the number of heads and their width from."""

    def __init__(self, dim: int, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.n_head, self.n_embd = 4, dim
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.size()
        if self.reads == "attributes":  # as nanoGPT
            q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
            q, k, v = (t.view(n, length, self.n_head, dim // self.n_head).transpose(1, 2) for t in (q, k, v))
        elif self.reads == "literal heads":
            q, k, v = self.c_attn(x).chunk(3, dim=2)
            q, k, v = (t.reshape(n, length, 4, -1).transpose(1, 2) for t in (q, k, v))
        else:  # literal widths
            q, k, v = self.c_attn(x).chunk(3, dim=2)
            q, k, v = (t.reshape(n, length, -1, 16).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(n, length, -1))


class GPTBlock(nn.Module):
    def __init__(self, dim: int, reads: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = FusedAttention(dim, reads)
        self.c_fc, self.c_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """GPT-2, Radford et al. 2019, with embeddings tied to the head."""

    def __init__(self, reads: str, dim: int = 64, layers: int = 2, longest: int = 64) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, dim), nn.Embedding(longest, dim)
        self.h = nn.ModuleList(GPTBlock(dim, reads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# --- Fourier neural operator


class SpectralConvolution(nn.Module):
    """Product of the lowest frequencies with complex weights, one matrix over channels per frequency."""

    def __init__(self, channels_in: int, channels_out: int, modes: int) -> None:
        super().__init__()
        self.out_channels, self.modes = channels_out, modes
        shape = channels_in, channels_out, modes, modes
        scale = channels_in**-0.5
        self.positive = nn.Parameter(scale * torch.randn(shape, dtype=torch.cfloat))
        self.negative = nn.Parameter(scale * torch.randn(shape, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        found, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros(x.shape[0], self.out_channels, *found.shape[2:], dtype=found.dtype, device=x.device)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", found[:, :, :m, :m], self.positive)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", found[:, :, -m:, :m], self.negative)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO(nn.Module):
    """Fourier neural operator in two dimensions, Li et al. 2021 (arXiv:2010.08895)."""

    def __init__(self, width: int = 32, layers: int = 4, modes: int = 6) -> None:
        super().__init__()
        self.lift = nn.Conv2d(3, width, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, width, modes) for _ in range(layers))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.hidden, self.out = nn.Conv2d(width, 128, 1), nn.Conv2d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.out(F.gelu(self.hidden(x)))


# --- SNGAN, with the spectral normalisation in the generator, too, as later GANs have it


class UpBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.b1, self.b2 = nn.BatchNorm2d(channels_in), nn.BatchNorm2d(channels_out)
        self.c1 = spectral_norm(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.c2 = spectral_norm(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(channels_in, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(F.interpolate(self.b1(x).relu(), scale_factor=2))
        return self.c2(self.b2(y).relu()) + self.shortcut(F.interpolate(x, scale_factor=2))


class DownBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.c1 = spectral_norm(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.c2 = spectral_norm(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(channels_in, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c2(self.c1(x.relu()).relu())
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


class Generator(nn.Module):
    """Generator for 32 x 32 images, Miyato et al. 2018 (arXiv:1802.05957), appendix B.4."""

    def __init__(self, noise: int = 32, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.dense = spectral_norm(nn.Linear(noise, width * 4 * 4))
        self.blocks = nn.Sequential(UpBlock(width, width), UpBlock(width, width), UpBlock(width, width))
        self.norm, self.out = nn.BatchNorm2d(width), spectral_norm(nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        x = self.blocks(self.dense(z).view(z.shape[0], self.width, 4, 4))
        return self.out(self.norm(x).relu()).tanh()


class Discriminator(nn.Module):
    """Discriminator for 32 x 32 images, Miyato et al. 2018 (arXiv:1802.05957), appendix B.4."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.Sequential(DownBlock(3, width), DownBlock(width, width), DownBlock(width, width))
        self.out = spectral_norm(nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(x).relu().sum((2, 3)))


# --- what other libraries bring


def graph_network(kind: str, **arguments: int) -> nn.Module:
    models = importlib.import_module("torch_geometric.nn.models")
    return getattr(models, kind)(in_channels=16, hidden_channels=64, num_layers=3, out_channels=7, **arguments)


def yolov8() -> nn.Module:
    return importlib.import_module("ultralytics.nn.tasks").DetectionModel("yolov8n.yaml", verbose=False)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 12))


def image(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side)


def graph() -> tuple[Tensor, Tensor]:
    """Return features of 30 nodes, and 120 edges between them."""
    return torch.randn(30, 16), torch.randint(30, (2, 120))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor | tuple[Tensor, ...]], str]] = {
    "llama-reference": (ReferenceLlama, tokens, ""),
    "gpt-attributes": (partial(GPT, "attributes"), tokens, ""),
    "gpt-literal-heads": (partial(GPT, "literal heads"), tokens, ""),
    "gpt-literal-width": (partial(GPT, "literal widths"), tokens, ""),
    "fno": (FNO, partial(image, 24), ""),
    "sngan-generator": (Generator, lambda: torch.randn(2, 32), ""),
    "sngan-discriminator": (Discriminator, partial(image, 32), ""),
    "gcn": (partial(graph_network, "GCN"), graph, "torch_geometric"),
    "gat": (partial(graph_network, "GAT", heads=4), graph, "torch_geometric"),
    "sage": (partial(graph_network, "GraphSAGE"), graph, "torch_geometric"),
    "yolov8n": (yolov8, partial(image, 128, 1), "ultralytics"),
}
"""Name -> what builds the network, what makes its inputs, and the library that it needs."""


def names() -> list[str]:
    """List the networks whose libraries are installed, and print which are left out."""
    missing = {name: library for name, (_, _, library) in NETWORKS.items() if library and not _installed(library)}
    for name, library in missing.items():
        print(f"{name}: left out, {library} is not installed")
    return [name for name in NETWORKS if name not in missing]


def build(name: str) -> tuple[nn.Module, Tensor | tuple[Tensor, ...]]:
    """Build a network with random weights, and its inputs."""
    network, inputs, _ = NETWORKS[name]
    return network(), inputs()


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
