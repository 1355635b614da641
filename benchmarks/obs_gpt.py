"""A character GPT trained on a text, then pruned at once: perplexity by magnitude, by Wanda's scores and by OBS.

    python -m benchmarks.obs_gpt --data ../data

Writes ``obs_gpt.json`` beside this file.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.data import data_module
from lightning_prune import prune_obs, prune_weights
from lightning_prune.algorithms.selection import keep_highest
from lightning_prune.algorithms.solvers import Pattern
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import gather_grams
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import call_on


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


def pieces(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Draw pieces of the text, ``(count, context + 1)``."""
    starts = torch.randint(len(text) - context - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


def perplexity(model: nn.Module, text: Tensor) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten()) for t in text.split(64)]
    return math.exp(sum(map(float, losses)) / len(losses))


def by_magnitude_and_activation(model: nn.Module, batches: list[Tensor], ignore: str, pattern: str | None) -> None:
    """Zero, row by row, the weights of least ``|w| * norm(x)``; nothing moves (Sun et al., Wanda, 2023)."""
    products = find_products(model, batches[0], call_on)
    names = [n for n in products.readings if not n.startswith(ignore)]
    for name, gram in gather_grams(model, products, names, Calibration(batches)).items():
        weight = model.get_parameter(name).data
        scores = weight.abs() * gram.hessian[0].diagonal().sqrt().to(weight)
        keep = (
            Pattern(2, 4).highest(scores)
            if pattern
            else torch.stack([keep_highest(row, len(row) - len(row) // 2) for row in scores])
        )
        weight.mul_(keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=256, help="for calibration")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    text = data_module(arguments.data).tinyshakespeare()
    known = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([known[character] for character in text])
    train, held = numbers[: int(0.9 * len(numbers))], numbers[int(0.9 * len(numbers)) :]
    draw = torch.Generator().manual_seed(0)
    model = GPT(len(known), arguments.context)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 50, (arguments.steps - step) / arguments.steps)
        batch = pieces(train, 32, arguments.context, draw)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    test = pieces(held, 512, arguments.context, draw)
    calibration = list(pieces(train, arguments.pieces, arguments.context, draw)[:, :-1].split(64))
    given = {name: value for name, value in vars(arguments).items() if name != "data"}
    rows = [{"name": "dense", "pattern": "", "perplexity": perplexity(model, test)}]
    asked = {"50 %": (0.5, None), "2:4": (None, "2:4")}
    ways: dict[str, Callable[[nn.Module, float | None, str | None], object]] = {
        "magnitude, by layer": lambda m, a, p: prune_weights(m, a, scope="layer", ignore=["head"], pattern=p),
        "magnitude x activation": lambda m, a, p: by_magnitude_and_activation(m, calibration, "head", p),
        "blocked, by layer": lambda m, a, p: prune_obs(
            m, batches=calibration, amount=a, solver="blocked", scope="layer", pattern=p, ignore=["head"]
        ),
        "exact, by layer": lambda m, a, p: prune_obs(
            m, batches=calibration, amount=a, solver="exact", scope="layer", pattern=p, ignore=["head"]
        ),
        "admm, by layer": lambda m, a, p: prune_obs(
            m, batches=calibration, amount=a, solver="admm", scope="layer", pattern=p, ignore=["head"]
        ),
        "admm, split": lambda m, a, p: prune_obs(
            m, batches=calibration, amount=a, solver="admm", scope="global", pattern=p, ignore=["head"]
        ),
        "admm, by layer, sequential": lambda m, a, p: prune_obs(
            m, batches=calibration, amount=a, solver="admm", scope="layer", pattern=p, sequential=True, ignore=["head"]
        ),
    }
    for told, (amount, pattern) in asked.items():
        for name, prune in ways.items():
            if pattern and name == "admm, split":  # a pattern is the same share everywhere
                continue
            pruned = copy.deepcopy(model)
            prune(pruned, amount, pattern)
            rows.append({"name": name, "pattern": told, "perplexity": perplexity(pruned, test)})
            Console().print(rows[-1])
            target = Path(__file__).with_suffix(".json")
            target.write_text(json.dumps({"arguments": given, "rows": rows}, indent=1))
    Console().print(rows)


if __name__ == "__main__":
    main()
