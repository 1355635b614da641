"""Cuts networks of torchvision to half their FLOPs, and tells how far from it they end, as fvcore counts them.

    python -m benchmarks.budgets                      # needs torchvision
    python -m benchmarks.budgets --models resnet50    # some of them

Writes what it prints into ``budgets.json`` beside this file, network by network.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import torch
from fvcore.nn import FlopCountAnalysis
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.structure import build
from lightning_prune import prune_filters
from lightning_prune.measure.footprint import measure
from lightning_prune.surgery import find_groups

RESULTS = Path(__file__).with_suffix(".json")
MODELS = (
    "alexnet", "vgg16_bn", "resnet18", "resnet50", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v2",
    "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny",
)  # fmt: skip
AMOUNT = 0.5
SCOPES = ("layer", "global")


def halve(name: str, scope: str, size: int) -> dict:
    """Cut one network to half its FLOPs, and count what it had and has.

    Returns:
        ``dense`` and ``left`` in multiply-adds by fvcore alone, and by how much the cut goes below what was asked:
        ``missed``, a share of the dense network, beside ``smallest_unit`` and ``largest_unit``, the shares of the dense
        network that one more unit of a group, all others as the cut leaves them, would take.
    """
    model, x = build(name), torch.zeros(1, 3, size, size)
    dense = fvcore(model, x)
    prune_filters(model, x, AMOUNT, criterion="l1", target="flops", scope=scope)
    left = fvcore(model, x)
    units = [unit / dense for unit in unit_costs(model, x)]
    return {
        "network": name,
        "scope": scope,
        "dense": dense,
        "left": left,
        "missed": ((1 - AMOUNT) * dense - left) / dense,
        "smallest_unit": min(units),
        "largest_unit": max(units),
    }


def fvcore(model: nn.Module, x: Tensor) -> int:
    """Count multiply-adds as fvcore does by itself, without what this library teaches it."""
    counts = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        return int(counts.tracer_warnings("none").total())


def unit_costs(model: nn.Module, x: Tensor) -> list[int]:
    """Return, for every group of a model, the multiply-adds that leave with one of its units."""
    structure = find_groups(model, x)
    cost = partial(measure, model, structure)
    whole = cost({}).flops
    first = {name: [False] + [True] * (group.width - 1) for name, group in structure.groups.items()}
    return [whole - cost({name: torch.tensor(keep).numpy()}).flops for name, keep in first.items()]


def table(rows: list[dict]) -> Table:
    """Lay out the rows in percent of the dense network's FLOPs."""
    title = f"{AMOUNT:.0%} of the FLOPs asked for; shares of the dense network, as fvcore counts"
    found = Table(title=title, caption="one unit: what the cheapest and the dearest unit left would take")
    for column in ("network", "scope", "GFLOPs", "left", "missed by", "one unit"):
        found.add_column(column, justify="left" if column in ("network", "scope") else "right")
    for row in rows:
        left, unit = row["left"] / row["dense"], f"{row['smallest_unit']:.3%} to {row['largest_unit']:.3%}"
        cells = (f"{row['dense'] / 1e9:.3f}", f"{left:.3%}", f"{row['missed']:.3%}", unit)
        found.add_row(row["network"], row["scope"], *cells)
    return found


def main() -> None:
    """Read the command line, make the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224, help="pixels on a side of the image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows: list[dict] = []
    for name in options.models:
        rows += [halve(name, scope, options.size) for scope in SCOPES]
        found = {"torch": torch.__version__, "size": options.size, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
