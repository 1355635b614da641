"""Sets criteria beside Table 1 of Molchanov et al., Pruning CNNs for Resource Efficient Inference (ICLR 2017).

    python -m benchmarks.molchanov2016 --data ../data

Every criterion is compared, by Spearman's rank correlation, with the oracle: the absolute change of the loss when one
feature map alone is silenced. The table is printed and written into ``molchanov2016.json`` beside this file.
"""

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches, cifar10, data_module
from benchmarks.models import resnet_cifar
from benchmarks.training import accuracy, fit
from lightning_prune.analysis.criterion_comparison import correlate, oracle
from lightning_prune.pruning.arguments import with_ignored
from lightning_prune.pruning.scoring import accumulate, accumulator_for
from lightning_prune.structure import Structure
from lightning_prune.surgery import find_groups

RESULTS = Path(__file__).with_suffix(".json")
TRAINED_VGG = Path(__file__).with_name("molchanov2016-vgg.pt")
EXAMPLE = torch.zeros(1, 3, 32, 32)
BATCH_SIZE = 32  # as the paper's
VGG_WIDTHS = ((16, 16), (32, 32), (64, 64, 64))  # max pooling follows each of the three

# Table 1 (arXiv:1611.06440), VGG-16 on Birds-200: per layer, all layers, all layers with l2 normalisation
PRINTED = {
    "l2": ("minimum weight", 0.27, 0.34, 0.33),
    "activation_mean": ("mean activation", 0.56, 0.35, 0.64),
    "activation_std": ("std of activation", 0.57, 0.30, 0.66),
    "taylor_activations": ("Taylor", 0.73, 0.14, 0.73),
    "random": ("random", 0.0, 0.0, 0.0),
}
CRITERIA = (*PRINTED, "taylor_second_order", "output_change", "l1", "bn_scale", "apoz", "taylor", "obd")
OTHERS = "oracle on other images"


def small_vgg() -> nn.Sequential:
    """A narrow VGG for 32x32 images, without BatchNorm as in the paper: seven convolutions, two linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels, number = 3, 0
    for stage, widths in enumerate(VGG_WIDTHS, start=1):
        for width in widths:
            number += 1
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
        layers[f"pool{stage}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels * 16, 128)
    layers["relu_fc1"] = nn.ReLU()
    layers["fc2"] = nn.Linear(128, 10)
    model = nn.Sequential(layers)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


def trained_vgg(folder: Path, epochs: int, parts: int, state: Path) -> nn.Module:
    """Train the narrow VGG, or load it where an earlier run has left it."""
    torch.manual_seed(0)
    model = small_vgg()
    if state.is_file():
        model.load_state_dict(torch.load(state, weights_only=True))
    else:
        batches = Batches(*cifar10(folder, "train", parts), batch_size=64, train=True)
        fit(model, batches, epochs, lr=0.01)
        fit(model, batches, 1, lr=0.001)
        torch.save(model.state_dict(), state)
    return model.eval()


def trained_resnet(folder: Path) -> nn.Module:
    """Load the trained ResNet-20 of the data folder."""
    model = resnet_cifar(20)
    model.load_state_dict(data_module(folder).resnet_cifar10(20))
    return model.eval()


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a batch."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def compare(
    name: str,
    model: nn.Module,
    batches: Batches,
    others: Batches,
    ignore: Sequence[str],
    criteria: Sequence[str],
    progress: bool,
) -> dict:
    """Correlate every criterion with the oracle on the same images; and, for what chance does, the oracle on others."""
    begin = perf_counter()
    structure = with_ignored(model, find_groups(model, EXAMPLE), ignore)
    truth = oracle(model, structure, batches, cross_entropy, progress=progress)
    found = {OTHERS: correlate(oracle(model, structure, others, cross_entropy, progress=progress), truth)}
    for criterion in criteria:
        torch.manual_seed(0)
        found[criterion] = correlate(named_scores(criterion, model, structure, batches), truth)
    with torch.inference_mode():
        loss = torch.stack([cross_entropy(model, batch) for batch in batches]).mean()
    return {
        "network": name,
        "ignore": list(ignore),
        "images": len(batches.images),
        "loss": float(loss),
        "accuracy_on_them": accuracy(model, batches),
        "seconds": perf_counter() - begin,
        "correlations": {criterion: asdict(correlation) for criterion, correlation in found.items()},
    }


def named_scores(criterion: str, model: nn.Module, structure: Structure, batches: Batches) -> dict[str, Tensor]:
    """Score every unit by a criterion, as the scores come."""
    return accumulate(accumulator_for(criterion), model, structure, batches, cross_entropy)


def table_of(results: list[dict]) -> Table:
    """Set ours beside the printed figures: per layer | all layers | all layers, each divided by its l2 norm."""
    caption = "Spearman's correlation with the oracle: per layer | all layers | all layers with l2 normalisation"
    table = Table(title="Molchanov et al. 2016, Table 1", caption=caption)
    table.add_column("criterion", no_wrap=True)
    table.add_column("paper: VGG-16,\nBirds-200", justify="right", no_wrap=True)
    for result in results:
        table.add_column(f"{result['network']},\n{result['images']} images", justify="right", no_wrap=True)
    for criterion in (*CRITERIA, OTHERS):
        printed = PRINTED.get(criterion)
        cells = [_cell(printed[1:]) if printed else ""]
        for result in results:
            found = result["correlations"].get(criterion)
            cells.append(_cell(tuple(found.values())) if found else "")
        table.add_row(f"{criterion} ({printed[0]})" if printed else criterion, *cells)
    return table


def _cell(figures: Sequence[float]) -> str:
    return " | ".join(f"{figure:5.2f}" for figure in figures)


def save(results: dict, path: Path) -> None:
    """Write results as JSON; networks that this run did not look at stay as they were."""
    found = json.loads(path.read_text())["results"] if path.exists() else {}
    saved = {"printed": PRINTED, "batch_size": BATCH_SIZE, "results": found | results}
    path.write_text(json.dumps(saved, indent=2) + "\n")


def main() -> None:
    """Read the command line, make the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py, see benchmarks/README.md")
    parser.add_argument("--networks", nargs="+", choices=["vgg", "resnet20", "resnet20-inner"],
                        default=["vgg", "resnet20", "resnet20-inner"])  # fmt: skip
    parser.add_argument("--images", type=int, default=256, help="images that the loss is measured on")
    parser.add_argument("--split", choices=["train", "test"], default="train")
    parser.add_argument(
        "--vgg-epochs", type=int, default=8, help="passes over the training images; 0.1 of lr in one more"
    )
    parser.add_argument("--train-parts", type=int, default=4, help="parts of 5,000 images that the VGG is trained on")
    parser.add_argument("--vgg-state", type=Path, default=TRAINED_VGG, help="where the trained VGG is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    networks: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
        # name -> how to get it, what is left out, criteria that do not apply
        "vgg": (
            lambda: trained_vgg(options.data, options.vgg_epochs, options.train_parts, options.vgg_state),
            ["fc1"],
            ["bn_scale"],
        ),
        "resnet20": (lambda: trained_resnet(options.data), [], []),
        "resnet20-inner": (lambda: trained_resnet(options.data), ["conv1"], []),  # without the residual stream
    }
    images, labels = cifar10(options.data, options.split, 1)
    batches, others = (
        Batches(images[first : first + options.images], labels[first : first + options.images], BATCH_SIZE)
        for first in (0, options.images)
    )
    console = Console(width=150)
    results = []
    for name in options.networks:
        load, ignore, inapt = networks[name]
        criteria = [criterion for criterion in CRITERIA if criterion not in inapt]
        results.append(compare(name, load(), batches, others, ignore, criteria, console.is_terminal))
        save({f"{name}, {options.split}": results[-1]}, options.json)
        console.print(f"{name}: loss {results[-1]['loss']:.3f}, {results[-1]['seconds']:.0f} s")
    console.print(table_of(results))


if __name__ == "__main__":
    main()
