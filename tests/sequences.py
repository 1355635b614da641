"""Tiny attention and recurrent networks whose head counts and widths are written into their code in many ways."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures import randomised

WIDTH, HEADS, HEAD = 24, 4, 6
TOKENS = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention written by hand, over ``(batch, heads, tokens, width)``."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v


class Fused(nn.Module):
    """One layer for queries, keys and values, numbers in attributes."""

    def __init__(self, attention: Callable[..., Tensor]):
        super().__init__()
        self.num_heads, self.head_dim, self.attention = HEADS, HEAD, attention
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(self.attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


class Chunked(Fused):
    """Heads taken apart with unflatten, chunk and a width derived from two attributes."""

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).movedim(2, 1) for part in self.qkv(x).chunk(3, -1))
        joined = self.attention(q, k, v).transpose(1, 2).contiguous()
        return self.proj(joined.view(*x.shape[:2], self.num_heads * self.head_dim))


class Derived(nn.Module):
    """The width of a head derived from the width of the stream."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        return self.proj(attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).reshape(batch, tokens, width))


class Grouped(nn.Module):
    """Several queries for each key, with rotated positions."""

    def __init__(self, shared: int):
        super().__init__()
        self.head_dim, self.repeats = HEAD, HEADS // shared
        self.q, self.k = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(WIDTH, shared * HEAD)
        self.v, self.o = nn.Linear(WIDTH, shared * HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def repeated(self, x):
        batch, heads, tokens, width = x.shape
        x = x[:, :, None].expand(batch, heads, self.repeats, tokens, width)
        return x.reshape(batch, heads * self.repeats, tokens, width)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1]).to(x)[:, None] / torch.arange(1, 1 + self.head_dim // 2).to(x)
        q, k = rotated(q, angle), rotated(k, angle)
        out = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v))
        return self.o(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate pairs of entries of ``(..., tokens, width)`` by angles ``(tokens, width / 2)``."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


class Biased(Fused):
    """A learnt bias for each head and relative position."""

    def __init__(self):
        super().__init__(attend)
        self.table = nn.Parameter(torch.rand(13, HEADS))
        self.register_buffer("index", torch.arange(7)[:, None] - torch.arange(7) + 6)

    def forward(self, x):
        bias = self.table[self.index.view(-1)].view(7, 7, -1).permute(2, 0, 1)
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(attend(*qkv, bias.unsqueeze(0)).transpose(1, 2).flatten(2))


class Crossed(nn.Module):
    """Learnt queries look at the stream."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.query, self.q = nn.Parameter(torch.rand(7, WIDTH)), nn.Linear(WIDTH, HEADS * HEAD)
        self.kv, self.o = nn.Linear(WIDTH, 2 * HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        q = self.q(self.query.expand(len(x), -1, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """Attention of torch."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.RMSNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a transformer of two blocks on one residual stream."""
    layers = [nn.Linear(5, WIDTH), Block(make()), Block(make()), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)]
    return randomised(nn.Sequential(*layers))


def encoder_decoder() -> nn.Module:
    """Build torch's transformer, encoder and decoder, on one input."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
            self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 32, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.transformer(x, x.flip(1)))

    return randomised(Both())


@dataclass(frozen=True)
class Sequence:
    """How to build a network, and what must be found in it.

    Attributes:
        build: Makes the module.
        heads: Path of what makes the heads -> how many units they are.
        tied: Whether they keep the same share as the stream.
    """

    build: Callable[[], nn.Module]
    heads: dict[str, int] = field(default_factory=dict)
    tied: bool = False


def both(path: str, heads: int) -> dict[str, int]:
    """Return the same for both blocks."""
    return {f"{block}.attention.{path}": heads for block in (1, 2)}


ATTENTION = {
    "fused": Sequence(lambda: blocks(lambda: Fused(F.scaled_dot_product_attention)), both("qkv", HEADS)),
    "by hand": Sequence(lambda: blocks(lambda: Fused(attend)), both("qkv", HEADS)),
    "chunked": Sequence(lambda: blocks(lambda: Chunked(attend)), both("qkv", HEADS)),
    "grouped queries": Sequence(lambda: blocks(lambda: Grouped(2)), both("q", 2)),
    "relative positions": Sequence(lambda: blocks(Biased), both("qkv", HEADS)),
    "cross": Sequence(lambda: blocks(Crossed), both("q", HEADS)),
    "derived": Sequence(lambda: blocks(Derived), both("qkv", HEADS), tied=True),
    "torch": Sequence(lambda: blocks(lambda: Torch(False)), both("attention.in_proj_weight", HEADS), tied=True),
    "torch, weights": Sequence(lambda: blocks(lambda: Torch(True)), both("attention.in_proj_weight", HEADS), tied=True),
    "encoder and decoder": Sequence(
        encoder_decoder,
        {
            f"transformer.{part}.layers.{layer}.{name}.in_proj_weight": HEADS
            for part, names in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "multihead_attn")))
            for layer in (0, 1)
            for name in names
        },
        tied=True,
    ),
}


class Layers(nn.Module):
    """Layers of torch's recurrent modules between linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **arguments):
        super().__init__()
        self.enter, self.rnn = nn.Linear(5, 8), kind(8, 12, batch_first=True, **arguments)
        width = arguments.get("proj_size", 12) * (2 if self.rnn.bidirectional else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        return self.out(self.rnn(self.enter(x))[0])


class Packed(Layers):
    """Sequences of different lengths."""

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.enter(x), torch.tensor([7, 4]), batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Steps(nn.Module):
    """A cell in a loop, its first state made of zeros, its states gathered in a blank tensor."""

    def __init__(self, kind: type[nn.RNNCellBase]):
        super().__init__()
        self.hidden, self.cell = 12, kind(8, 12)
        self.enter, self.out = nn.Linear(5, 8), nn.Linear(12, 3)

    def forward(self, x):
        x = self.enter(x)
        state = torch.zeros(len(x), self.hidden).to(x)
        states = [state, torch.zeros_like(state)]
        gathered = x.new_empty(*x.shape[:2], self.hidden)
        for step in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                states = self.cell(x[:, step], states)
            else:
                states = [self.cell(x[:, step], states[0])]
            gathered[:, step] = states[0]
        return self.out(gathered)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Layers(nn.LSTM),
    "gru": lambda: Layers(nn.GRU, num_layers=2, bidirectional=True),
    "rnn": lambda: Layers(nn.RNN, nonlinearity="relu"),
    "layers and directions": lambda: Layers(nn.LSTM, num_layers=2, bidirectional=True),
    "projected": lambda: Layers(nn.LSTM, proj_size=6, num_layers=2, bidirectional=True),
    "packed": lambda: Packed(nn.LSTM, bidirectional=True),
    "packed gru": lambda: Packed(nn.GRU),
    "lstm cell": lambda: Steps(nn.LSTMCell),
    "gru cell": lambda: Steps(nn.GRUCell),
    "rnn cell": lambda: Steps(nn.RNNCell),
}
