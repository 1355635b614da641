"""Cuts trained CIFAR-10 ResNets to half their FLOPs at once by several criteria, fine-tunes all alike, and compares.

    python -m benchmarks.half_flops --data ../data --depth 20 --seeds 3      # needs torch-pruning for the comparison

Writes what it prints into ``half_flops-<depth>.json`` beside this file.
"""

import argparse
import copy
import importlib
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy, fit
from lightning_prune import count_flops, prune_filters

ONE_IMAGE = torch.zeros(1, 3, 32, 32)
OURS = [(criterion, scope) for criterion in ("l1", "taylor", "taylor_activations") for scope in ("layer", "global")]
OTHER = [(criterion, scope) for criterion in ("l1", "taylor") for scope in ("layer", "global")]
CONTROL = [("random", "layer")]
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(model: nn.Module, criterion: str, scope: str, batches: list[Batch]) -> nn.Module:
    """Cut a copy of the model to half its FLOPs."""
    model = copy.deepcopy(model)
    prune_filters(model, ONE_IMAGE, 0.5, criterion, "flops", scope, batches=batches, loss=loss)
    return model


def torch_pruning(model: nn.Module, criterion: str, scope: str, batches: list[Batch]) -> nn.Module:
    """Cut a copy of the model to at most half its FLOPs, by the smallest pruning ratio that does."""
    library = importlib.import_module("torch_pruning")
    dense = count_flops(model, ONE_IMAGE).total

    def cut(ratio: float) -> nn.Module:
        slim = copy.deepcopy(model).eval()
        if criterion == "taylor":
            for batch in batches:
                loss(slim, batch).backward()
        kind = (
            library.importance.GroupTaylorImportance
            if criterion == "taylor"
            else library.importance.GroupMagnitudeImportance
        )
        importance = kind() if criterion == "taylor" else kind(p=1)
        library.pruner.BasePruner(
            slim,
            ONE_IMAGE,
            importance,
            pruning_ratio=ratio,
            global_pruning=scope == "global",
            ignored_layers=[slim.linear],
        ).step()
        for parameter in slim.parameters():
            parameter.grad = None
        return slim

    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        if count_flops(cut(middle), ONE_IMAGE).total <= dense / 2:
            high = middle
        else:
            low = middle
    return cut(high)


def save(options: argparse.Namespace, dense: float, seen: int, rows: list[dict]) -> None:
    """Write what there is so far, so that a run that is stopped has not run for nothing."""
    asked = {name: value for name, value in vars(options).items() if name != "data"}
    result = {**asked, "dense": dense, "images_seen": seen, "rows": rows}
    Path(__file__).with_name(f"half_flops-{options.depth}.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Read the command line, make the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py, see benchmarks/README.md")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 44, 56))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-parts", type=int, default=2, help="parts of 5,000 training images")
    parser.add_argument("--test-parts", type=int, default=2, help="parts of 5,000 test images")
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    dense = resnet_cifar(options.depth)
    dense.load_state_dict(data_module(options.data).resnet_cifar10(options.depth))
    images, labels = cifar10(options.data, "train", options.train_parts)
    test = Batches(*cifar10(options.data, "test", options.test_parts), batch_size=250)
    scored = [(images[i : i + 128], labels[i : i + 128]) for i in range(0, 1024, 128)]
    flops, whole = count_flops(dense, ONE_IMAGE).total, accuracy(dense, test)

    methods = [("ours", ours, *way) for way in OURS + CONTROL] + [
        ("torch-pruning", torch_pruning, *way) for way in OTHER
    ]
    rows = []
    seen = options.epochs * len(images)
    for library, cut, criterion, scope in methods:
        row: dict = {"library": library, "criterion": criterion, "scope": scope, "after_cut": [], "fine_tuned": []}
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            slim = cut(dense, criterion, scope, scored)
            row["flops_left"] = count_flops(slim, ONE_IMAGE).total / flops
            row["params_left"] = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in dense.parameters())
            row["after_cut"].append(accuracy(slim, test))
            fit(slim, Batches(images, labels, 128, train=True, seed=seed), options.epochs, options.lr)
            row["fine_tuned"].append(accuracy(slim, test))
        rows.append(row)
        save(options, whole, seen, rows)
        print(f"{library} {criterion} {scope}: {statistics.mean(row['fine_tuned']):.4f}", flush=True)

    title = f"ResNet-{options.depth} ({100 * whole:.2f} %) at half its FLOPs, fine-tuned on {seen:,} images seen"
    table = Table(title=title, caption=f"Test accuracy: mean and spread over {options.seeds} seeds.")
    for heading in (
        "library",
        "criterion",
        "scope",
        "FLOPs left",
        "params left",
        "after the cut",
        "fine-tuned",
        "spread",
    ):
        table.add_column(heading, justify="left" if heading in ("library", "criterion", "scope") else "right")
    for row in rows:
        mean, spread = statistics.mean(row["fine_tuned"]), max(row["fine_tuned"]) - min(row["fine_tuned"])
        shares = (row["flops_left"], row["params_left"], statistics.mean(row["after_cut"]), mean)
        cells = (f"{100 * share:.2f} %" for share in shares)
        table.add_row(row["library"], row["criterion"], row["scope"], *cells, f"{100 * spread:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
