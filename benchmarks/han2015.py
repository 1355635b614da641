"""Reproduces Table 1 of Han et al. 2015 on MNIST: error of LeNet-300-100 and LeNet-5 with 12 times fewer weights.

    python -m benchmarks.han2015 --data DIR

Each network is trained densely, and then pruned while it trains on, by ``IterativeMagnitudePruning``: at the paper's
own rates layer by layer, and at several compressions with one threshold for all layers. Beside these the dense network
is trained on for as long. Errors are those after the last pass; no pass is chosen by its error. Results go into
``han2015.json`` beside this file as they come, and what is there is not trained again.
"""

import argparse
import copy
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches, mnist
from benchmarks.models import lenet_5, lenet_300_100
from benchmarks.training import Classifier, accuracy
from lightning_prune import Cubic, IterativeMagnitudePruning

RESULTS = Path(__file__).with_suffix(".json")
NETWORKS = {"LeNet-300-100": lenet_300_100, "LeNet-5": lenet_5}
KEPT = {  # Han et al. 2015, Tables 3 and 4: share of each layer's weights that stays
    "LeNet-300-100": {"fc1": 0.08, "fc2": 0.09, "fc3": 0.26},
    "LeNet-5": {"conv1": 0.66, "conv2": 0.12, "fc1": 0.08, "fc2": 0.19},
}
PAPER = {"LeNet-300-100": (1.64, 1.59), "LeNet-5": (0.80, 0.77)}  # error in %: dense, pruned 12x
SNIP = {  # Lee et al. 2019, Table 1: sparsity in %, error in %, of LeNet-300-100 and of LeNet-5
    "LWC (Han et al.)": {"LeNet-300-100": (91.7, 1.6), "LeNet-5": (91.7, 0.8)},
    "DNS": {"LeNet-300-100": (98.2, 2.0), "LeNet-5": (99.1, 0.9)},
    "OBD": {"LeNet-300-100": (92.0, 2.0), "LeNet-5": (92.0, 2.7)},
    "L-OBS": {"LeNet-300-100": (98.5, 2.0), "LeNet-5": (99.0, 2.1)},
    "SNIP": {"LeNet-300-100": (95.0, 1.6), "LeNet-5": (98.0, 0.8)},
}
PASSES = {"LeNet-300-100": (4, 6), "LeNet-5": (2, 3)}  # over the training images: dense, and in each arm after it
COMPRESSIONS = {"LeNet-300-100": (12, 30, 20, 45, 60), "LeNet-5": (12, 30, 60)}


class OneCycle(Classifier):
    """A network whose learning rate rises and falls once over the whole training."""

    def configure_optimizers(self) -> dict:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(net: nn.Module, batches: Batches, epochs: int, lr: float, callbacks: Iterable[pl.Callback] = ()) -> None:
    """Train ``net`` in place, on the CPU."""
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(OneCycle(net.train(), lr=lr), batches)


def pruning(amount: float | dict[str, float], steps: int) -> IterativeMagnitudePruning:
    """Twenty cuts in the first half of the training, ever smaller ones."""
    schedule = Cubic(start=0, end=steps // 2, every=max(1, steps // 40), by="steps")
    if isinstance(amount, dict):
        return IterativeMagnitudePruning(
            {f"net.{name}": a for name, a in amount.items()}, scope="layer", schedule=schedule
        )
    return IterativeMagnitudePruning(amount, scope="global", schedule=schedule)


def arms(name: str, compressions: Iterable[float]) -> dict[str, float | dict[str, float] | None]:
    """Name each training that follows the dense one, and say how much of the weights leaves in it."""
    rates = {layer: 1 - kept for layer, kept in KEPT[name].items()}
    return {"dense, on": None, "12x, the paper's rates": rates} | {f"{c:g}x": 1 - 1 / c for c in compressions}


def left(net: nn.Module) -> float:
    """The share of the weights, biases apart, that is not zero."""
    weights = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


class Run:
    """One network with one seed: trained densely once, and then on in every arm that is asked for.

    Args:
        name: The network.
        seed: What its weights and the order of the images start from.
        data: Images and digits to train on, and to test on.
        lr: Highest learning rate.
    """

    def __init__(self, name: str, seed: int, data: tuple[Tensor, ...], lr: float):
        self.name, self.seed, self.lr = name, seed, lr
        self.images, self.labels, *tests = data
        self.tests = Batches(*tests, 1000)
        self.passes, self.more = PASSES[name]
        self.net: nn.Module | None = None

    def dense(self) -> nn.Module:
        """Return the dense network, trained."""
        if self.net is None:
            torch.manual_seed(self.seed)
            self.net = NETWORKS[self.name]().to(memory_format=torch.channels_last)  # twice as fast on a CPU
            train(self.net, self._batches(self.seed), self.passes, self.lr)
        return self.net

    def pruned(self, amount: float | dict[str, float] | None) -> nn.Module:
        """Return a copy that was trained on, and pruned meanwhile."""
        net, batches = copy.deepcopy(self.dense()), self._batches(self.seed + 1000)
        train(net, batches, self.more, self.lr, [] if amount is None else [pruning(amount, self.more * len(batches))])
        return net

    def judge(self, net: nn.Module) -> dict[str, float]:
        """Return the error on the test images in %, and the share of the weights that is left."""
        return {"error": round(100 * (1 - accuracy(net, self.tests)), 2), "left": round(left(net), 5)}

    def _batches(self, seed: int) -> Batches:
        return Batches(self.images, self.labels, 128, train=True, seed=seed, crop=False)


def table(name: str, found: dict) -> Table:
    """Mean and spread over the seeds, beside what the papers report."""
    dense, pruned = PAPER[name]
    rows = Table("", "weights left", "error %", "spread", "seeds", title=f"{name} on MNIST")
    for arm in dict.fromkeys(arm for seed in found.values() for arm in seed):
        own = [seed[arm] for seed in found.values() if arm in seed]
        errors = [each["error"] for each in own]
        spread = f"{stdev(errors):.2f}" if len(errors) > 1 else ""
        rows.add_row(arm, f"{mean(each['left'] for each in own):.2%}", f"{mean(errors):.2f}", spread, str(len(errors)))
    rows.add_section()
    rows.add_row("Han et al., dense", "100%", f"{dense:.2f}")
    rows.add_row("Han et al., 12x", "8%", f"{pruned:.2f}")
    for method, (sparsity, error) in ((method, reported[name]) for method, reported in SNIP.items()):
        rows.add_row(f"{method} (in SNIP's table)", f"{100 - sparsity:.1f}%", f"{error:.1f}")
    return rows


def command_line(description: str, seeds: int, results: Path, threads: int) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks of LeNets on MNIST share, with these defaults."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="data folder, see README.md")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--json", type=Path, default=results)
    return parser


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, tuple[Tensor, ...], dict]:
    """Read the command line; return the options, images and digits to train on and to test on, and the results."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = (*mnist(options.data, "train"), *mnist(options.data, "test"))
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    return options, data, results


def main() -> None:
    """Read the command line, train, print the tables, write the JSON."""
    parser = command_line(__doc__, 5, RESULTS, torch.get_num_threads())
    parser.add_argument("--compressions", type=float, nargs="+", help="by default those of the README")
    parser.add_argument("--lr", type=float, default=0.1, help="highest learning rate")
    options, data, results = begin(parser)
    for name in options.networks:
        runs = [Run(name, seed, data, options.lr) for seed in range(options.seeds)]
        todo = {"dense": None} | arms(name, options.compressions or COMPRESSIONS[name])
        for arm, seed in itertools.product(todo, range(options.seeds)):
            found = results.setdefault(name, {}).setdefault(str(seed), {})
            if arm not in found:
                net = runs[seed].dense() if arm == "dense" else runs[seed].pruned(todo[arm])
                found[arm] = runs[seed].judge(net)
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    for name in options.networks:
        Console().print(table(name, results[name]))


if __name__ == "__main__":
    main()
