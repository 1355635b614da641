"""Prunes a trained ResNet-56 to equal measured latency by layers, by filters and by both, without any training.

    python -m benchmarks.depth_and_width --data ../shared/data
    python -m benchmarks.depth_and_width --data ../shared/data --kept 0.9 0.8 0.7 --sizes 1 64

All three take the same calibration images, and refit what follows. Accuracy is of the first test images. The latency of
all models of a batch size is measured in turns afterwards, as CPU time; the table has medians. Writes
``depth_and_width.json`` and, with matplotlib, ``depth_and_width.png``.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.data import cifar10, data_module
from benchmarks.depth import BATCH, Batches, latencies, loss, split
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy
from lightning_prune import PruningError, prune_filters, prune_layers

RESULTS = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).with_suffix(".png")
WAYS = ("layers", "filters", "both")


def pruned(dense: nn.Module, way: str, size: int, kept: float, batches: Batches) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of a model with a share of its latency left, and what was removed.

    Args:
        dense: The trained model.
        way: What is removed.
        size: Images of the call that is timed.
        kept: Share of the latency that is left.
        batches: Calibration images and labels.
    """
    slim, example = copy.deepcopy(dense), torch.randn(size, 3, 32, 32)
    given: dict[str, Any] = {"target": "latency", "batches": batches, "loss": loss, "repair": True, "progress": False}
    start = time.perf_counter()
    tried: list[list[float]] = []
    if way == "layers":
        removed = len(prune_layers(slim, example, 1 - kept, criterion="loss", **given).removed)
    else:
        both = way == "both"
        report = prune_filters(slim, example, 1 - kept, criterion="obs", scope="global", layers=both, **given)
        removed = len(report.removed)
        tried = [[each.layers, each.by_layers, each.by_filters, each.lost] for each in report.tried]
    params = sum(parameter.numel() for parameter in slim.parameters())
    return slim, {"layers": removed, "params": params, "tried": tried, "seconds": time.perf_counter() - start}


def draw(rows: list[dict[str, Any]], dense: float) -> None:
    """Draw accuracy against latency, a panel for each batch size and a curve for each way."""
    import matplotlib.pyplot as plt

    sizes = sorted({row["size"] for row in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 3.5), squeeze=False)
    for size, panel in zip(sizes, axes[0], strict=True):
        for way in WAYS:
            own = sorted(
                (row["ms"], 100 * row["accuracy"]) for row in rows if row["size"] == size and row["way"] == way
            )
            panel.plot(*zip(*own, strict=True), marker="o", label=way) if own else None
        panel.axhline(100 * dense, color="grey", linewidth=0.8)
        panel.set(title=f"batch {size}", xlabel="ms of CPU", ylabel="accuracy, %")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.85, 0.7], help="shares of the latency")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64], help="batch sizes that are timed")
    options = parser.parse_args()
    torch.manual_seed(0)
    test = split(*cifar10(options.data, "test", parts=1), options.images, 250)
    batches = split(*cifar10(options.data, "train", parts=1), options.calibration, BATCH)
    dense = resnet_cifar(56)
    dense.load_state_dict(data_module(options.data).resnet_cifar10(56))
    dense.eval()
    base = accuracy(dense, test)
    rows: list[dict[str, Any]] = []
    console = Console()
    for size in options.sizes:
        models: dict[str, nn.Module] = {"dense": dense}
        of_size: list[dict[str, Any]] = []
        for kept in options.kept:
            for way in WAYS:
                row = {"size": size, "way": way, "kept": kept}
                try:
                    slim, found = pruned(dense, way, size, kept, batches)
                except PruningError as error:
                    rows.append({**row, "refused": str(error)})
                    console.print(rows[-1])
                    continue
                models[f"{way} {kept}"] = slim
                of_size.append({**row, **found, "accuracy": accuracy(slim, test)})
                console.print(of_size[-1])
        measured = latencies(models, size)
        for row in of_size:
            rows.append({**row, "ms": measured[f"{row['way']} {row['kept']}"], "dense_ms": measured["dense"]})
    RESULTS.write_text(json.dumps({"accuracy": base, "images": options.images, "rows": rows}, indent=1) + "\n")
    table = Table("batch", "asked", "way", "blocks gone", "parameters", "ms of CPU", "dense ms", "accuracy")
    made = [row for row in rows if "ms" in row]
    for row in made:
        cells = [row["size"], f"{row['kept']:.0%}", row["way"], row["layers"], row["params"]]
        cells += [f"{row['ms']:.2f}", f"{row['dense_ms']:.2f}", f"{row['accuracy']:.1%}"]
        table.add_row(*map(str, cells))
    console.print(table)
    draw(made, base)


if __name__ == "__main__":
    main()
