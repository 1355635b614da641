"""Reproduces Table 1 of Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017, arXiv:1608.08710), on CIFAR-10.

    python -m benchmarks.li2016                                # FLOPs and parameters: seconds, no data needed
    python -m benchmarks.li2016 --accuracy --data ../data      # ResNet-56-B from trained weights: cut, then fine-tune

Both write what they print into ``li2016.json`` beside this file.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.models import resnet_cifar, vgg16_cifar
from benchmarks.training import accuracy, fit
from lightning_prune import prune_filters

RESULTS = Path(__file__).with_suffix(".json")
EXAMPLE = torch.zeros(1, 3, 32, 32)
LEARNING_RATE = 1e-3  # sec. 4: retraining at a constant 0.001
BATCH_SIZE = 128


@dataclass(frozen=True)
class Printed:
    """Figures as the paper prints them."""

    flops: str  # multiply-adds of the dense network
    params: str
    flops_left: str
    params_left: str
    flops_cut: str  # percent of the dense network's
    params_cut: str


@dataclass(frozen=True)
class Recipe:
    """One pruned network of Table 1: what is built, how much each layer loses, what the paper prints."""

    name: str
    build: Callable[[], nn.Module]
    amounts: dict[str, float]  # module name -> share of its filters removed
    printed: Printed


def first_convolutions(depth: int, percents: tuple[int, int, int], skipped: Sequence[int]) -> dict[str, float]:
    """The share removed of every block's first convolution, stage by stage.

    Args:
        depth: Depth of the ResNet, 6n + 2.
        percents: Percent of filters pruned in each of the three stages.
        skipped: Layers left whole. Layer 1 is the convolution before the first stage, so the blocks' first
            convolutions are the even layers: 2, 4, ..., ``depth - 2``.

    Of 16 filters pruned by 60 %, 6 stay: the paper keeps the whole part of what the percentage leaves, as the library
    does.
    """
    blocks = (depth - 2) // 6
    shares = {}
    for layer in range(2, depth, 2):
        stage, block = divmod(layer // 2 - 1, blocks)
        if percents[stage] and layer not in skipped:
            shares[f"layer{stage + 1}.{block}.conv1"] = percents[stage] / 100
    return shares


RECIPES = (
    Recipe(
        "VGG-16-A",
        vgg16_cifar,
        {f"conv{layer}": 0.5 for layer in (1, 8, 9, 10, 11, 12, 13)},
        Printed("3.13e8", "1.5e7", "2.06e8", "5.4e6", "34.2", "64.0"),
    ),
    Recipe(
        "ResNet-56-A",
        lambda: resnet_cifar(56),
        first_convolutions(56, (10, 10, 10), skipped=(16, 20, 38, 54)),
        Printed("1.25e8", "8.5e5", "1.12e8", "7.7e5", "10.4", "9.4"),
    ),
    Recipe(
        "ResNet-56-B",
        lambda: resnet_cifar(56),
        first_convolutions(56, (60, 30, 10), skipped=(16, 18, 20, 34, 38, 54)),
        Printed("1.25e8", "8.5e5", "9.09e7", "7.3e5", "27.6", "13.7"),
    ),
    Recipe(
        "ResNet-110-A",
        lambda: resnet_cifar(110),
        first_convolutions(110, (50, 0, 0), skipped=(36,)),
        Printed("2.53e8", "1.72e6", "2.13e8", "1.68e6", "15.9", "2.3"),
    ),
    Recipe(
        "ResNet-110-B",
        lambda: resnet_cifar(110),
        first_convolutions(110, (50, 40, 30), skipped=(36, 38, 74)),
        Printed("2.53e8", "1.72e6", "1.55e8", "1.16e6", "38.6", "32.4"),
    ),
)


def weighed(model: nn.Module) -> tuple[int, int]:
    """Count as the paper does: multiply-adds and weights of convolutions and linear layers, and nothing else.

    BatchNorm and biases are left out: with them ResNet-56 would cost 1.27e8 (1.26e8 with one operation per element)
    and ResNet-110-A hold 1.69e6 parameters, where the paper prints 1.25e8 and 1.68e6.

    Returns:
        Multiply-adds for one image, and weights.
    """
    model = copy.deepcopy(model).eval()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    flops = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs
        flops.append(layer.weight.numel() * math.prod(output.shape[2:]))  # each weight is used once per pixel

    for layer in layers:
        layer.register_forward_hook(count)
    with torch.inference_mode():
        model(EXAMPLE)
    return sum(flops), sum(layer.weight.numel() for layer in layers)


def agreement(printed: str, value: float) -> str:
    """Say how ``value`` meets the digits of ``printed``: ``"rounded"``, ``"cut off"`` or ``"no"``.

    Example:
        >>> agreement("13.7", 13.68), agreement("13.7", 13.77), agreement("1.5e7", 14986176), agreement("13.7", 13.9)
        ('rounded', 'cut off', 'rounded', 'no')
    """
    mantissa, _, exponent = printed.partition("e")
    decimals = len(mantissa.partition(".")[2])
    scaled = value / 10 ** int(exponent or 0)
    if f"{scaled:.{decimals}f}" == mantissa:
        return "rounded"
    whole = math.floor(scaled * 10**decimals)
    return "cut off" if f"{whole / 10**decimals:.{decimals}f}" == mantissa else "no"


def reproduce(recipe: Recipe) -> dict:
    """Build the network, prune it by the recipe and set our figures beside the printed ones."""
    torch.manual_seed(0)
    model = recipe.build()
    flops, params = weighed(model)
    report = prune_filters(model, EXAMPLE, amount=recipe.amounts)
    flops_left, params_left = weighed(model)
    ours = {
        "flops": flops,
        "params": params,
        "flops_left": flops_left,
        "params_left": params_left,
        "flops_cut": 100 * (1 - flops_left / flops),
        "params_cut": 100 * (1 - params_left / params),
    }
    return {
        "network": recipe.name,
        "figures": {
            name: {"printed": printed, "ours": ours[name], "agrees": agreement(printed, ours[name])}
            for name, printed in vars(recipe.printed).items()
        },
        "proved": report.proved,
        "with_batchnorm_and_biases": {  # the library's own count
            "flops": report.flops_before,
            "params": report.params_before,
            "flops_left": report.flops_after,
            "params_left": report.params_after,
        },
    }


def architecture_table(rows: list[dict]) -> Table:
    """Set our figures under the printed ones; those that do not round to the printed digits are marked."""
    caption = "Above: the paper. Below: ours. Cut off: as printed, but for rounding."
    table = Table(title="Li et al. 2016, Table 1", caption=caption, show_lines=True, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for heading in ("FLOPs", "params", "FLOPs left", "params left", "FLOPs cut", "params cut"):
        table.add_column(heading, justify="right")
    marks = {"rounded": "", "cut off": "\n[yellow]cut off[/]", "no": "\n[red]differs[/]"}
    for row in rows:
        cells = []
        for name, figure in row["figures"].items():
            form = "{} %\n{:.2f} %" if name.endswith("_cut") else "{}\n{:.4e}"
            cell = form.format(figure["printed"], figure["ours"]).replace("e+0", "e")
            cells.append(cell + marks[figure["agrees"]])
        table.add_row(row["network"], *cells)
    return table


def measure_accuracy(folder: Path, epochs: int, parts: int, seed: int) -> dict:
    """Cut the trained ResNet-56 by recipe B and fine-tune it; beside it the same widths chosen by chance."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == "ResNet-56-B")
    dense = recipe.build()
    dense.load_state_dict(data_module(folder).resnet_cifar10(56))
    images, labels = cifar10(folder, "train", parts)
    test = Batches(*cifar10(folder, "test"), batch_size=250)
    networks = []
    for criterion in ("l1", "random"):
        model = copy.deepcopy(dense)
        torch.manual_seed(seed)
        report = prune_filters(model, EXAMPLE, amount=recipe.amounts, criterion=criterion)
        after_cut = accuracy(model, test)
        fit(model, Batches(images, labels, BATCH_SIZE, train=True, seed=seed), epochs, LEARNING_RATE)
        networks.append(
            {
                "criterion": criterion,
                "flops_left": weighed(model)[0],
                "proved": report.proved,
                "accuracy_after_cut": after_cut,
                "accuracy_after_fine_tuning": accuracy(model, test),
            }
        )
    return {
        "network": recipe.name,
        "accuracy_dense": accuracy(dense, test),
        "test_images": len(test.images),
        "images_seen": epochs * len(images),
        "epochs": epochs,
        "lr": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "seed": seed,
        "pruned": networks,
    }


def accuracy_table(result: dict) -> Table:
    """Show the test accuracy of the dense, the cut and the fine-tuned network."""
    title = f"{result['network']}: test accuracy, fine-tuned on {result['images_seen']:,} images seen"
    table = Table("filters removed", "FLOPs left", "dense", "after the cut", "after fine-tuning", title=title)
    for row in result["pruned"]:
        shares = (result["accuracy_dense"], row["accuracy_after_cut"], row["accuracy_after_fine_tuning"])
        table.add_row(row["criterion"], f"{row['flops_left']:,}", *(f"{100 * share:.2f} %" for share in shares))
    return table


def save(results: dict, path: Path) -> None:
    """Write results as JSON; sections that this run did not make stay as they were."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | results, indent=2) + "\n")


def main() -> None:
    """Read the command line, make the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accuracy", action="store_true", help="cut and fine-tune ResNet-56-B; needs --data")
    parser.add_argument("--data", type=Path, help="folder with load.py, see benchmarks/README.md")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training images (paper: 40)")
    parser.add_argument("--train-parts", type=int, default=2, help="parts of 5,000 training images (paper: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    if options.accuracy:
        if options.data is None:
            parser.error("--accuracy needs --data, the folder with the images and the trained weights")
        result = measure_accuracy(options.data, options.epochs, options.train_parts, options.seed)
        console.print(accuracy_table(result))
        save({"accuracy": result}, options.json)
    else:
        rows = [reproduce(recipe) for recipe in RECIPES]
        console.print(architecture_table(rows))
        save({"architecture": rows}, options.json)


if __name__ == "__main__":
    main()
