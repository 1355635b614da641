"""A small character GPT, its training and its perplexity; knows nothing of pruning."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import pieces

__all__ = ["GPT", "Block", "perplexity", "train"]


class Block(nn.Module):
    """Causal attention with one projection for queries, keys and values, and a feed-forward layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, characters: int, context: int, width: int = 96, heads: int = 4, layers: int = 2):
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.places(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def train(
    model: nn.Module,
    text: Tensor,
    steps: int,
    context: int,
    batch_size: int,
    generator: torch.Generator,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
) -> None:
    """Train in place by AdamW; the learning rate rises for 50 steps and falls along a line.

    Args:
        model: Maps ``(N, context)`` characters to logits of the next ones.
        text: Numbers of characters, from which pieces are drawn.
        steps: Optimizer steps.
        context: Characters of a piece.
        batch_size: Pieces of a batch.
        generator: Source of the random choices.
        penalty: What is added to the loss after each forward pass.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 50, (steps - step) / steps)
        batch = pieces(text, batch_size, context, generator)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + penalty()).backward()
        optimizer.step()
    model.eval()


def perplexity(model: nn.Module, text: Tensor) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten()) for t in text.split(64)]
    return math.exp(sum(map(float, losses)) / len(losses))
