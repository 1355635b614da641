"""Cuts trained CIFAR-10 ResNets to half their FLOPs at once by several criteria, fine-tunes all alike, and compares.

    python -m benchmarks.half_flops --data ../data --depth 20 --seeds 3      # needs torch-pruning for the comparison
    python -m benchmarks.half_flops --data ../data --seeds 2 --leaders 1 --epochs 10 --train-parts 10 --anneal \
        --finalists --out half_flops-20-ten.json                             # all training images, ten times

Every run is written into ``half_flops-<depth>.json`` beside this file when it ends; what stands there is not run again.
"""

import argparse
import copy
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

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
SCORED = 1024  # training images that criteria look at
Batch = tuple[Tensor, Tensor]


class Method(NamedTuple):
    """A way to cut; "repaired", what reads the channels that leave is refitted to the images scored, without labels.

    ``groups`` says which channels may leave: all, or the inner ones of the blocks alone, as Li et al. prune ResNets.
    ``taught`` says whether the fine-tuning learns the dense network's answers beside the labels.
    """

    library: str
    criterion: str
    scope: str
    groups: str = "all"
    taught: bool = False


METHODS = (
    Method("ours", "l1", "layer"),
    Method("ours", "output_change", "global"),
    Method("ours", "taylor", "global"),
    Method("ours", "obs, repaired", "global"),
    Method("ours", "l1, repaired", "layer"),
    *(Method("torch-pruning", criterion, scope) for scope in ("layer", "global") for criterion in ("l1", "taylor")),
    Method("torch-pruning", "l1", "layer", "inner"),
    Method("torch-pruning", "taylor", "global", "inner"),
    Method("ours", "l1", "global"),
    Method("ours", "taylor", "layer"),
    Method("ours", "taylor_activations", "layer"),
    Method("ours", "taylor_activations", "global"),
    Method("ours", "output_change", "global", "inner"),
    Method("ours", "random", "layer"),
)
FINALISTS = (
    Method("ours", "obs, repaired", "global"),
    Method("torch-pruning", "l1", "layer", "inner"),
    Method("ours", "output_change", "global"),
    Method("torch-pruning", "taylor", "global", "inner"),
)
"""The two methods of each library that did best in the short runs."""


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def ours(dense: nn.Module, method: Method, batches: Sequence[Batch]) -> nn.Module:
    """Cut a copy of the model to half its FLOPs."""
    model = copy.deepcopy(dense)
    ignore = (
        ["conv1"] if method.groups == "inner" else []
    )  # the first convolution makes the stream that all blocks add to
    criterion, repaired = method.criterion.removesuffix(", repaired"), method.criterion.endswith(", repaired")
    if repaired:
        images = [images for images, _ in batches]
        prune_filters(
            model,
            ONE_IMAGE,
            0.5,
            criterion=criterion,
            target="flops",
            scope=method.scope,
            batches=images,
            ignore=ignore,
            repair=True,
        )
    else:
        prune_filters(
            model,
            ONE_IMAGE,
            0.5,
            criterion=criterion,
            target="flops",
            scope=method.scope,
            ignore=ignore,
            batches=batches,
            loss=loss,
        )
    return model


def torch_pruning(dense: nn.Module, method: Method, batches: Sequence[Batch]) -> nn.Module:
    """Cut a copy of the model to at most half its FLOPs, by the smallest pruning ratio that does."""
    library = importlib.import_module("torch_pruning")
    kind, arguments = {"l1": ("GroupMagnitudeImportance", {"p": 1}), "taylor": ("GroupTaylorImportance", {})}[
        method.criterion
    ]
    model = copy.deepcopy(dense).eval()
    for batch in batches if method.criterion == "taylor" else ():
        loss(model, batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

    def cut(ratio: float) -> nn.Module:
        slim = copy.deepcopy(model)
        for name, parameter in slim.named_parameters():  # a copy has no gradients
            parameter.grad = None if gradients[name] is None else gradients[name].clone()
        outer = [slim.conv1, *(m for n, m in slim.named_modules() if n.startswith("layer") and n.endswith(".conv2"))]
        library.pruner.BasePruner(
            slim,
            ONE_IMAGE,
            getattr(library.importance, kind)(**arguments),
            pruning_ratio=ratio,
            global_pruning=method.scope == "global",
            ignored_layers=[slim.linear, *(outer if method.groups == "inner" else ())],
        ).step()
        return slim

    half = count_flops(dense, ONE_IMAGE).total / 2
    low, high = 0.0, 0.9
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if count_flops(cut(middle), ONE_IMAGE).total <= half else (middle, high)
    slim = cut(high)
    slim.zero_grad()
    return slim


CUTS = {"ours": ours, "torch-pruning": torch_pruning}


class Results:
    """The runs of one network so far, in a file that is written after each.

    Args:
        path: The file; what it holds is taken up.
        settings: What the runs were made with. A file of other settings is not mixed with.

    Raises:
        ValueError: If the file holds runs of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.runs: list[dict] = []
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] != settings:
                raise ValueError(f"{path} holds runs of {found['settings']}; move it away to run {settings}.")
            self.runs = found["runs"]

    def holds(self, method: Method, seed: int) -> bool:
        """Whether a run has been made."""
        return any(run["seed"] == seed and method == method_of(run) for run in self.runs)

    def add(self, method: Method, **figures: float) -> None:
        """Take in the figures of a run, and write the file."""
        self.runs.append({**method._asdict(), **figures})
        self.path.write_text(json.dumps({"settings": self.settings, "runs": self.runs}, indent=1) + "\n")


def method_of(run: dict) -> Method:
    """Read what a run was made by."""
    return Method(**{field: run[field] for field in Method._fields if field in run})


def contenders(runs: list[dict], leaders: int) -> list[Method]:
    """Return the methods that go on to another seed: of each library those that did best with the first."""
    first = sorted((run for run in runs if run["seed"] == 0), key=lambda run: -run["fine_tuned"])
    best = {library: [method_of(run) for run in first if run["library"] == library][:leaders] for library in CUTS}
    return [method for own in best.values() for method in own]


def run_all(
    results: Results,
    seeds: int,
    leaders: int,
    cut: Callable[[Method, int], tuple[nn.Module, dict]],
    tune: Callable[[nn.Module, int, bool], float],
    methods: Sequence[Method] = METHODS,
) -> None:
    """Make the runs that are missing, seed by seed: all methods with the first, the leaders with the others."""
    for seed in range(seeds):
        for method in contenders(results.runs, leaders) if seed else methods:
            if not results.holds(method, seed):
                slim, figures = cut(method, seed if method.criterion == "random" else 0)
                results.add(method, seed=seed, **figures, fine_tuned=tune(copy.deepcopy(slim), seed, method.taught))


def size(model: nn.Module) -> int:
    """Count parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def table(runs: list[dict], title: str) -> Table:
    """Lay out the mean over seeds of every method, the best first."""
    found = Table(title=title, caption="Test accuracy; spread: between the best and the worst seed.")
    fields = Method._fields
    for heading in (*fields, "seeds", "FLOPs left", "params left", "after the cut", "fine-tuned", "spread"):
        found.add_column(heading, justify="left" if heading in fields else "right")
    by_method: dict[Method, list[dict]] = {}
    for run in runs:
        by_method.setdefault(method_of(run), []).append(run)
    tuned = {method: [run["fine_tuned"] for run in own] for method, own in by_method.items()}
    for method in sorted(tuned, key=lambda method: -statistics.mean(tuned[method])):
        names = ("flops_left", "params_left", "after_cut", "fine_tuned")
        means = [statistics.mean(run[name] for run in by_method[method]) for name in names]
        spread = max(tuned[method]) - min(tuned[method])
        shares = [f"{100 * mean:.2f} %" for mean in means]
        found.add_row(
            *method[:-1], "yes" if method.taught else "no", str(len(tuned[method])), *shares, f"{100 * spread:.2f}"
        )
    return found


def main() -> None:
    """Read the command line, make the runs that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py, see benchmarks/README.md")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 44, 56))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--leaders", type=int, default=3, help="methods of each library that go on to further seeds")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train-parts", type=int, default=2, help="parts of 5,000 training images")
    parser.add_argument("--test-parts", type=int, default=2, help="parts of 5,000 test images")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--anneal", action="store_true", help="let the learning rate fall to zero along a cosine")
    parser.add_argument("--finalists", action="store_true", help="run only the best two methods of each library")
    parser.add_argument("--taught", action="store_true", help="fine-tune with the dense network as a teacher")
    parser.add_argument("--out", default=None, help="name of the file, by default half_flops-<depth>.json")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = resnet_cifar(options.depth)
    dense.load_state_dict(data_module(options.data).resnet_cifar10(options.depth))
    images, labels = cifar10(options.data, "train", options.train_parts)
    test = Batches(*cifar10(options.data, "test", options.test_parts), batch_size=250)
    scored = list(Batches(images[:SCORED], labels[:SCORED], batch_size=128))
    settings = {name: getattr(options, name) for name in ("depth", "epochs", "train_parts", "test_parts", "lr")}
    if options.anneal:
        settings["anneal"] = True
    results = Results(Path(__file__).with_name(options.out or f"half_flops-{options.depth}.json"), settings)

    flops, params = count_flops(dense, ONE_IMAGE).total, size(dense)

    @cache  # only chance cuts differently from seed to seed
    def cut(method: Method, seed: int) -> tuple[nn.Module, dict]:
        torch.manual_seed(seed)
        slim = CUTS[method.library](dense, method, scored)
        left = {
            "flops_left": count_flops(slim, ONE_IMAGE).total / flops,
            "params_left": size(slim) / params,
            "after_cut": accuracy(slim, test),
        }
        return slim, left

    def tune(slim: nn.Module, seed: int, taught: bool) -> float:
        batches = Batches(images, labels, 128, train=True, seed=seed)
        teacher = copy.deepcopy(dense).eval() if taught else None
        fit(slim, batches, options.epochs, options.lr, options.anneal, teacher)
        return accuracy(slim, test)

    methods = [method._replace(taught=options.taught) for method in (FINALISTS if options.finalists else METHODS)]
    run_all(results, options.seeds, options.leaders, cut, tune, methods)
    title = f"ResNet-{options.depth} at half its FLOPs, fine-tuned on {options.epochs * len(images):,} images seen"
    Console(width=120).print(table(results.runs, title))


if __name__ == "__main__":
    main()
