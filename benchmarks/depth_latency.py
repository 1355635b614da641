"""Prunes width, depth and both to the same budgets without training, and compares what is left at equal latency.

    python -m benchmarks.depth_latency --data ../shared/data
    python -m benchmarks.depth_latency --data ../shared/data --network gpt

Networks are a trained ResNet-56 (accuracy on CIFAR-10) and a character transformer of 8 blocks that is trained here
(perplexity). Width is ``prune_filters(criterion="obs")``, depth is ``prune_layers(criterion="loss")``, both is
``prune_filters(layers=True)``; all refit on the same batches. Latencies are CPU time as a share of the dense network's:
all networks run in turns, and of the ratios of all turns the median counts. What a method gives at a latency is read
off the straight lines between its own best networks. Writes ``depth_latency.json`` and, with matplotlib,
``depth_latency.png``.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import cifar10, data_module, pieces, shakespeare
from benchmarks.gpt import GPT, perplexity, train
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy
from lightning_prune import PruningError, count_flops, prune_filters, prune_layers

RESULTS = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).with_suffix(".png")
METHODS = ("width", "depth", "both")
AT = (0.9, 0.8, 0.7, 0.6, 0.5)
TURNS = 9
CONTEXT = 64
Batches = list[tuple[Tensor, Tensor]]
Row = dict[str, Any]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a batch: of images, or of all characters of texts."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def pruned(
    model: nn.Module, method: str, amount: float, inputs: Tensor, batches: Batches, ask: argparse.Namespace
) -> tuple[nn.Module, str]:
    """Return a copy of a model with an amount of the target gone, and what was removed, in words."""
    slim = copy.deepcopy(model)
    given = {"target": ask.target, "batches": batches, "loss": loss, "repair": True, "progress": False}
    if method == "depth":
        layers = prune_layers(slim, inputs, amount, criterion="loss", **given)
        return slim, f"{len(layers.removed)} layers"
    report = prune_filters(
        slim, inputs, amount, criterion="obs", scope="global", round_to=ask.round_to, layers=method == "both", **given
    )
    tried = ", ".join(f"{each.layers}: {each.refused[:60] or f'{each.lost:.4f}'}" for each in report.tried)
    return slim, f"{len(report.removed)} layers and filters; tried {tried}" if tried else "filters"


def latencies(models: dict[str, nn.Module], inputs: Tensor) -> dict[str, float]:
    """Return the CPU time of a call of each model as a share of the dense one's, the median of all turns."""
    calls = 1 if len(inputs) > 8 else 10
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            times = {}
            for name, model in models.items():
                start = time.process_time()
                for _ in range(calls):
                    model(inputs)
                times[name] = time.process_time() - start
            for name, seconds in times.items() if turn else ():  # the first prepares what the others reuse
                found[name].append(seconds / times["dense"])
    return {name: median(ratios) for name, ratios in found.items()}


def at_latency(points: list[tuple[float, float]], latency: float, higher: bool) -> float | None:
    """Return what a method gives at a latency, between its best networks; None if none is as fast.

    Args:
        points: Latency and value of each network, the dense one among them.
        latency: Share of the dense network's.
        higher: Whether higher values are better.
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points):  # a network that is slower and no better is none that anyone would take
        if not best or (point[1] > best[-1][1]) == higher:
            best.append(point)
    for (fast, one), (slow, other) in pairwise(best):
        if fast <= latency <= slow:
            return one + (other - one) * (latency - fast) / (slow - fast)
    return None


def resnet(data: Path, ask: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], float], Batches, Tensor]:
    """Return the trained ResNet-56, what measures accuracy, batches to refit on, and 64 inputs to time."""
    images, labels = cifar10(data, "test", parts=1 if ask.examples <= 5000 else None)
    test = list(zip(images[: ask.examples].split(250), labels[: ask.examples].split(250), strict=True))
    images, labels = cifar10(data, "train", parts=1)
    batches = list(zip(images[: ask.calibration].split(64), labels[: ask.calibration].split(64), strict=True))
    dense = resnet_cifar(56)
    dense.load_state_dict(data_module(data).resnet_cifar10(56))
    return dense, lambda model: accuracy(model, test), batches, images[:64]


def transformer(data: Path, ask: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], float], Batches, Tensor]:
    """Return a transformer of 8 blocks after some minutes of training, likewise with perplexity."""
    text, held, characters = shakespeare(data)
    draw = torch.Generator().manual_seed(0)
    model = GPT(characters, CONTEXT, width=64, heads=4, layers=8)
    train(model, text, ask.steps, CONTEXT, 32, draw)
    test = pieces(held, 256, CONTEXT, draw)
    texts = pieces(text, ask.calibration, CONTEXT, draw).split(64)
    batches = [(part[:, :-1], part[:, 1:]) for part in texts]
    return model, lambda slim: perplexity(slim, test), batches, pieces(held, 64, CONTEXT, draw)[:, :-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--network", choices=("resnet56", "gpt"), default="resnet56")
    parser.add_argument("--target", choices=("flops", "latency"), default="flops", help="of the budgets")
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.15, 0.3, 0.45, 0.6])
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=128, help="training examples to refit on")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no more networks are pruned")
    parser.add_argument("--steps", type=int, default=1000, help="to train the transformer")
    ask = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense, measure, batches, inputs = {"resnet56": resnet, "gpt": transformer}[ask.network](ask.data, ask)
    dense.eval()
    models = {"dense": dense}
    rows: dict[str, Row] = {"dense": {"method": "dense", "flops_kept": 1.0, "value": measure(dense)}}
    whole = count_flops(dense, inputs[:1]).total
    began = time.monotonic()
    for amount in ask.amounts:
        for method in METHODS:
            if time.monotonic() - began > 60 * ask.minutes:
                continue
            name, start = f"{method}, {amount:.0%}", time.process_time()
            try:
                slim, removed = pruned(dense, method, amount, inputs[:1], batches, ask)
            except PruningError as error:
                print(name, error, flush=True)
                continue
            models[name] = slim.eval()
            rows[name] = {
                "method": method,
                "amount": amount,
                "removed": removed,
                "flops_kept": count_flops(slim, inputs[:1]).total / whole,
                "value": measure(slim),
                "seconds": round(time.process_time() - start),
            }
            print(name, rows[name], flush=True)
    for size in (1, 64):
        for name, ratio in latencies(models, inputs[:size]).items():
            rows[name][f"latency_{size}"] = ratio
    facts = {name: value for name, value in vars(ask).items() if name != "data"}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[ask.network] = {
        **facts,
        "rows": rows,
        "at": {str(size): compared(ask.network, rows, size) for size in (1, 64)},
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    for network, found in known.items():
        show(network, found)
    draw(known)


def compared(network: str, rows: dict[str, Row], size: int) -> dict[str, dict[str, float | None]]:
    """Return what each method gives at each latency."""
    found: dict[str, dict[str, float | None]] = {}
    for method in METHODS:
        own = [row for row in rows.values() if row["method"] in (method, "dense")]
        points = [(row[f"latency_{size}"], row["value"]) for row in own]
        found[method] = {str(ratio): at_latency(points, ratio, network == "resnet56") for ratio in AT}
    return found


def show(network: str, found: dict[str, Any]) -> None:
    """Print what each method gives at equal latency."""
    table = Table(title=f"{network}, nothing trained after pruning; dense {found['rows']['dense']['value']:.4g}")
    table.add_column("latency kept")
    for size in found["at"]:
        for method in METHODS:
            table.add_column(f"{method}, batch {size}", justify="right")
    for ratio in AT:
        values = [found["at"][size][method][str(ratio)] for size in found["at"] for method in METHODS]
        table.add_row(f"{ratio:.0%}", *("-" if value is None else f"{value:.4g}" for value in values))
    Console().print(table)


def draw(known: dict[str, Any]) -> None:
    """Draw what is left against latency, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return
    figure, axes = plt.subplots(len(known), 2, figsize=(9, 3.4 * len(known)), squeeze=False, sharey="row")
    for line, (network, found) in zip(axes, known.items(), strict=True):
        for axis, size in zip(line, (1, 64), strict=True):
            for method in METHODS:
                own = [row for row in found["rows"].values() if row["method"] in (method, "dense")]
                points = sorted((row[f"latency_{size}"], row["value"]) for row in own)
                axis.plot(*zip(*points, strict=True), marker="o", label=method)
            axis.set_title(f"{network}, batch {size}")
            axis.set_xlabel("latency, share of dense")
        line[0].set_ylabel("perplexity" if network == "gpt" else "accuracy")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()
