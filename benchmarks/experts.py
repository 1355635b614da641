"""A character model with mixtures of experts, trained on a text; then whole experts leave, nothing trained afterwards.

    python -m benchmarks.experts --data ../data

Perplexity on held-out text with a quarter and a half of the experts of each mixture removed: by REAP, by how often
experts are chosen, and by chance (mean and range of five draws). Writes ``experts.json`` beside this file.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.data import pieces, shakespeare
from benchmarks.gpt import GPT, Block, perplexity, train
from lightning_prune.pruning.experts import prune_experts

DRAWS = 5


class Mixture(nn.Module):
    """Sends each character to the best two of its experts; keeps the loss that balances them (Switch Transformers)."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int = 2):
        super().__init__()
        self.chosen, self.balance = chosen, torch.zeros(())
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        gates = self.router(flat).softmax(-1)
        top, numbers = gates.topk(self.chosen, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        shares = []
        for number, expert in enumerate(self.experts):
            token, place = torch.where(numbers == number)
            out = out.index_add(0, token, expert(flat[token]) * top[token, place, None])
            shares.append(len(token) / len(flat))
        self.balance = (torch.tensor(shares) * gates.mean(0)).sum() * len(self.experts)
        return out.view_as(x)


class MixtureBlock(Block):
    """The block of the dense model, with a mixture for its feed-forward layer."""

    def __init__(self, width: int, heads: int, experts: int):
        super().__init__(width, heads)
        self.up, self.down = Mixture(width, width, experts), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.up(self.norm2(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--pieces", type=int, default=128, help="for calibration")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    text, held, characters = shakespeare(arguments.data)
    model = GPT(characters, arguments.context, width=96, heads=4, layers=0)
    model.blocks = nn.Sequential(*(MixtureBlock(96, 4, arguments.experts) for _ in range(arguments.layers)))
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    first = torch.Generator().manual_seed(0)
    train(
        model, text, arguments.steps, arguments.context, 16, first,
        lambda: 0.01 * sum(mixture.balance for mixture in mixtures),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    test = pieces(held, 512, arguments.context, draw)
    calibration = list(pieces(text, arguments.pieces, arguments.context, draw)[:, :-1].split(32))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = [{"way": "dense", "removed": 0.0, "perplexity": perplexity(model, test), "params": parameters}]
    for amount in (0.25, 0.5):
        for way in ("reap", "frequency", *["random"] * DRAWS):
            pruned = copy.deepcopy(model)
            torch.manual_seed(len(rows))
            start = time.process_time()
            report = prune_experts(pruned, calibration[0][:4], amount, criterion=way, batches=calibration)
            seconds = round(time.process_time() - start, 1)
            rows.append({
                "way": way, "removed": amount, "perplexity": perplexity(pruned, test), "params": report.params_after,
                "proved": report.proved, "cpu_seconds": seconds,
            })  # fmt: skip
            Console().print(rows[-1])
    given = {name: value for name, value in vars(arguments).items() if name != "data"}
    Path(__file__).with_suffix(".json").write_text(json.dumps({"arguments": given, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
