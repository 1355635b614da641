"""Times reading, planning, proving and cutting networks of torchvision beside torch-pruning and a plain forward pass.

    python -m benchmarks.structure                      # needs torchvision and torch-pruning
    python -m benchmarks.structure --models resnet50    # some of them

Writes what it prints into ``structure.json`` beside this file. Ours is everything that ``prune_filters`` does but the
counting of FLOPs, which is timed by itself; torch-pruning's is building its dependency graph and pruning once.
"""

import argparse
import contextlib
import importlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

with contextlib.suppress(ImportError):  # where torchvision was built for another device; before Lightning imports it
    importlib.import_module("torchvision_cpu")

from lightning_prune.budget import Budget, Dense, Footprint, measure, plan
from lightning_prune.flops import count_flops
from lightning_prune.scoring import score_units
from lightning_prune.structure import find_structure, trace
from lightning_prune.surgery import cut_, draft, prove

RESULTS = Path(__file__).with_suffix(".json")
MODELS = ("resnet18", "resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")
AMOUNT = 0.3
STEPS = ("trace", "groups", "plan", "proof", "cut")


def build(name: str) -> nn.Module:
    """Build a network of torchvision with random weights and random BatchNorm statistics."""
    models = importlib.import_module("torchvision.models")
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Cut the model as ``prune_filters`` does and return the seconds of each step."""
    seconds: dict[str, float] = {}
    with timed(seconds, "trace"):
        ledger = trace(model, x)
    with timed(seconds, "groups"):
        structure = find_structure(ledger)
    with timed(seconds, "plan"):
        widths = {name: group.width for name, group in structure.groups.items()}
        keep = plan(
            structure, score_units(model, structure, "l1"), AMOUNT, Budget(),
            dense=Dense(widths, Footprint(0, 0)), footprint=partial(measure, model, structure),
        )  # fmt: skip
        cut = draft(model, structure, keep)
        tensors = cut.tensors(model)
    with timed(seconds, "proof"):
        failure = prove(model, x, structure, cut, tensors)
    if failure:
        raise RuntimeError(failure.reason)
    with timed(seconds, "cut"):
        cut_(model, cut, tensors)
    return seconds


def torch_pruning(model: nn.Module, x: Tensor) -> float:
    """Prune the model with torch-pruning, all but its classifier, and return the seconds."""
    library = importlib.import_module("torch_pruning")
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    start = time.perf_counter()
    importance = library.importance.GroupMagnitudeImportance(p=1)
    library.pruner.BasePruner(model, x, importance, pruning_ratio=AMOUNT, ignored_layers=classifier).step()
    return time.perf_counter() - start


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds that the body takes under a name."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def compare(name: str, repeats: int) -> dict[str, float]:
    """Time one network, ours and torch-pruning in turns, and return medians in seconds."""
    x = torch.randn(1, 3, 224, 224)
    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        model, row = build(name), {}
        params = sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            model(x)
            with timed(row, "forward"):
                model(x)
        with timed(row, "flops"):
            count_flops(model, x)
        row |= ours(model, x)
        row["ours"] = sum(row[step] for step in STEPS)
        other = build(name)
        row["torch-pruning"] = torch_pruning(other, x)
        rows.append(row)
    medians = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}  # the first one warms up
    return medians | {
        "ratio": statistics.median(row["ours"] / row["torch-pruning"] for row in rows[1:]),
        "params kept": sum(p.numel() for p in model.parameters()) / params,
        "params kept by torch-pruning": sum(p.numel() for p in other.parameters()) / params,
    }


def table(results: dict[str, dict[str, float]]) -> Table:
    """Lay out the medians in milliseconds."""
    title = f"One cut of {AMOUNT:.0%} of the channels at 224 x 224, milliseconds (medians)"
    found = Table(title=title, caption="ours: all that prune_filters does but counting FLOPs (last column)")
    for column in ("network", "forward", "ours", "torch-pruning", "ratio", *STEPS, "FLOPs"):
        found.add_column(column, justify="left" if column == "network" else "right")
    for name, row in results.items():
        times = [f"{1e3 * row[key]:.0f}" for key in ("forward", "ours", "torch-pruning")]
        steps = [f"{1e3 * row[step]:.0f}" for step in STEPS]
        found.add_row(name, *times, f"{row['ratio']:.2f}", *steps, f"{1e3 * row['flops']:.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    results = {name: compare(name, arguments.repeats) for name in arguments.models}
    Console(width=120).print(table(results))
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
    about |= {"repeats": arguments.repeats, "seconds": results}
    arguments.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
