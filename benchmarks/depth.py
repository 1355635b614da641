"""Removes layers, filters and both from a trained ResNet-56 without any training, and measures accuracy and latency.

    python -m benchmarks.depth --data ../shared/data
    python -m benchmarks.depth --data ../shared/data --images 10000 --criterion loss

One greedy run gives the order in which blocks leave. Its first 2, 4, 6 and 8 blocks are removed with and without the
repair. Filters are pruned by ``obs`` to the same FLOPs, and in the last runs behind some of the layers. Writes
``depth.json`` and, with matplotlib, ``depth.png``.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import cifar10, data_module
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy
from lightning_prune import count_flops, prune_filters
from lightning_prune.measure.calibration import Calibration
from lightning_prune.model.calls import call_on
from lightning_prune.pruning.layer_plan import LayerPlan, Skips
from lightning_prune.pruning.layer_repair import LayerRepair, repaired_layers
from lightning_prune.pruning.layer_scores import LayerData, score_layers
from lightning_prune.pruning.layers import apply_layers_
from lightning_prune.structure.skippable import Depth, find_skippable
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.verify_skips import SkipProof, verify_skips

RESULTS = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).with_suffix(".png")
BLOCKS = (2, 4, 6, 8)
BATCH = 64
TURNS = 7
Batches = list[tuple[Tensor, Tensor]]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def split(images: Tensor, labels: Tensor, count: int, size: int) -> Batches:
    """Return the first so many images in batches."""
    return list(zip(images[:count].split(size), labels[:count].split(size), strict=True))


def greedy(model: nn.Module, depth: Depth, batches: Batches, criterion: str, steps: int) -> list[str]:
    """Return the layers in the order in which they leave, each scored without those before it."""
    data = LayerData(batches if criterion in ("loss", "taylor") else [images for images, _ in batches], call_on, loss)
    skips: Skips = {}
    for _ in range(steps):
        left = [path for path in depth.layers if path not in skips]
        scores = score_layers(model, depth, left, criterion, data, skips)
        best = min(left, key=scores.__getitem__)
        skips[best] = skip_of(depth.layers[best])
    return list(skips)


def without(model: nn.Module, depth: Depth, paths: list[str], batches: Batches, repair: bool) -> nn.Module:
    """Return a copy of a model without some layers, what follows them refitted or not; the removal is verified."""
    slim = copy.deepcopy(model)
    skips = {path: skip_of(depth.layers[path]) for path in paths}
    proof = verify_skips(slim, batches[0][0][:2], skips)
    if proof.wrong:
        raise RuntimeError(proof.wrong)
    fixed = LayerRepair({}, (), {})
    if repair:
        fixed = repaired_layers(slim, skips, Calibration([images for images, _ in batches], call_on), 0.01)
    apply_layers_(slim, LayerPlan(skips, (), SkipProof(), {}, 0.0, ""), fixed)
    return slim


def narrower(model: nn.Module, batches: Batches, amount: float) -> nn.Module:
    """Return a copy of a model with a share of its FLOPs gone in filters, their readers refitted."""
    slim = copy.deepcopy(model)
    given = [images for images, _ in batches]
    prune_filters(
        slim, given[0][:1], amount, criterion="obs", target="flops", scope="global", batches=given, progress=False
    )
    return slim


def latencies(models: dict[str, nn.Module], size: int) -> dict[str, float]:
    """Return milliseconds of a call of each model, in turns; of each turn CPU time counts, and of all the median."""
    images = torch.randn(size, 3, 32, 32)
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for name, model in models.items():
                start = time.process_time()
                model(images)
                if turn:  # the first prepares what the others reuse
                    found[name].append(1000 * (time.process_time() - start))
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--criterion", default="influence")
    parser.add_argument("--filters", action="store_true", help="prune filters, and both, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = cifar10(options.data, "test", parts=1 if options.images <= 5000 else None)
    test = split(images, labels, options.images, 250)
    batches = split(*cifar10(options.data, "train", parts=1), options.calibration, BATCH)
    dense = resnet_cifar(56)
    dense.load_state_dict(data_module(options.data).resnet_cifar10(56))
    dense.eval()
    depth = find_skippable(dense, batches[0][0][:2])
    whole = count_flops(dense, batches[0][0][:1]).total
    order = greedy(dense, depth, batches, options.criterion, max(BLOCKS))
    models: dict[str, nn.Module] = {"dense": dense}
    rows: dict[str, Any] = {}

    def note(name: str, model: nn.Module) -> None:
        models[name] = model.eval()
        flops = count_flops(model, batches[0][0][:1]).total
        rows[name] = {"flops_removed": 1 - flops / whole, "accuracy": accuracy(model, test)}
        print(name, rows[name], flush=True)

    note("dense", dense)
    for blocks in BLOCKS:
        note(f"{blocks} layers", without(dense, depth, order[:blocks], batches, repair=False))
        note(f"{blocks} layers, repaired", without(dense, depth, order[:blocks], batches, repair=True))
    if options.filters:
        for blocks in BLOCKS[1::2]:
            share = rows[f"{blocks} layers"]["flops_removed"]
            note(f"filters, {share:.0%}", narrower(dense, batches, share))
        half, full = (rows[f"{blocks} layers"]["flops_removed"] for blocks in BLOCKS[1::2])
        both = narrower(models[f"{BLOCKS[1]} layers, repaired"], batches, 1 - (1 - full) / (1 - half))
        note(f"{BLOCKS[1]} layers and filters, {full:.0%}", both)
    for size in (1, 64):
        for name, milliseconds in latencies(models, size).items():
            rows[name][f"milliseconds_{size}"] = milliseconds
    found = {"criterion": options.criterion, "calibration": options.calibration, "images": options.images}
    RESULTS.write_text(json.dumps({**found, "order": order, "rows": rows}, indent=1) + "\n")
    show(rows)
    draw(rows)


def show(rows: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="ResNet-56 on CIFAR-10, nothing trained")
    for heading in ("model", "FLOPs gone", "accuracy", "ms, batch 1", "ms, batch 64"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in rows.items():
        numbers = f"{row['flops_removed']:.1%}", f"{row['accuracy']:.1%}"
        table.add_row(name, *numbers, f"{row['milliseconds_1']:.1f}", f"{row['milliseconds_64']:.0f}")
    Console().print(table)


def draw(rows: dict[str, Any]) -> None:
    """Draw accuracy over latency, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    kinds = {"layers": "layers", "layers, repaired": "repaired", "filters": "filters,", "both": "and filters"}
    for axis, size in zip(axes, (1, 64), strict=True):
        for label, part in kinds.items():
            own = [row for name, row in rows.items() if _is_kind(name, part)]
            points = sorted((row[f"milliseconds_{size}"], row["accuracy"]) for row in own)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xlabel(f"milliseconds of CPU, batch {size}")
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def _is_kind(name: str, part: str) -> bool:
    if part == "filters,":
        return name.startswith(part)
    if part == "layers":
        return name.endswith(part)
    return part in name


if __name__ == "__main__":
    main()
