"""A character GPT trained on a text, then pruned at once: perplexity by magnitude, by Wanda's scores and by OBS.

    python -m benchmarks.obs_gpt --data ../data

Writes ``obs_gpt.json`` beside this file.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.data import pieces, shakespeare
from benchmarks.gpt import GPT, perplexity, train
from lightning_prune import prune_obs, prune_weights
from lightning_prune.algorithms.selection import keep_highest
from lightning_prune.algorithms.solvers import Pattern
from lightning_prune.measure.calibration import Calibration
from lightning_prune.measure.grams import gather_grams
from lightning_prune.measure.products import find_products
from lightning_prune.model.calls import call_on


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
    text, held, characters = shakespeare(arguments.data)
    draw = torch.Generator().manual_seed(0)
    model = GPT(characters, arguments.context)
    train(model, text, arguments.steps, arguments.context, 32, draw)
    test = pieces(held, 512, arguments.context, draw)
    calibration = list(pieces(text, arguments.pieces, arguments.context, draw)[:, :-1].split(64))
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
