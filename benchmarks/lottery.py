"""Reproduces Figures 3 and 4 of Frankle & Carbin 2019 on MNIST: winning tickets of LeNet-300-100 beside random ones.

    python -m benchmarks.lottery --data DIR

One ``fit`` finds all tickets of a seed: rounds of ``IterativeMagnitudePruning``, after each of which 20 % of what is
left leaves (of the output layer 10 %) and the rest goes back to its initial values. Training in a round is the training
of that round's ticket, so its curve is measured on the way. Then the same masks are trained from weights drawn anew.
Curves go into ``lottery.json`` beside this file as they come, the picture into ``lottery.png``.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data import Batches, mnist
from benchmarks.models import lenet_300_100
from benchmarks.training import Classifier, accuracy
from lightning_prune import Geometric, IterativeMagnitudePruning, apply_masks_

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = {
    0: "100",
    3: "51.3",
    7: "21.1",
    12: "7.0",
    15: "3.6",
    18: "1.9",
}  # round -> % of weights left, as in the paper
EVERY = 100  # steps between two looks at the test images
LAYERS = {"net.fc1": 0.8, "net.fc2": 0.8, "net.fc3": 0.9}  # share of what is left that survives a round


class Adam(Classifier):
    """The paper's optimizer: Adam at 1.2e-3, without decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1.2e-3)


class Curves(Callback):
    """Notes the accuracy on the test images every so many steps of every round."""

    def __init__(self, tests: Batches, steps: int):
        self.tests, self.steps = tests, steps
        self.rounds: list[dict] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        number, step = divmod(trainer.global_step - 1, self.steps)
        if step == 0:
            self.rounds.append({"left": left(pl_module), "accuracy": []})
        if (number in ROUNDS or len(self.rounds) == 1) and (step + 1) % EVERY == 0:
            self.rounds[number]["accuracy"].append(round(100 * accuracy(pl_module, self.tests), 2))


def left(module: nn.Module) -> float:
    """The share of the weights, biases apart, that is not zero, in %."""
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return round(100 * sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights), 2)


def fit(module: Adam, batches: Batches, epochs: int, callbacks: Iterable[Callback]) -> None:
    """Train in place, on the CPU."""
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, batches)


class Keep(Callback):
    """Keeps the masks of the rounds that are looked at."""

    def __init__(self, steps: int):
        self.steps = steps
        self.masks: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        number, step = divmod(trainer.global_step - 1, self.steps)
        if step == 0 and number in ROUNDS:
            self.masks[number] = {name: p != 0 for name, p in pl_module.named_parameters() if p.dim() > 1}


def tickets(seed: int, train: Batches, tests: Batches, epochs: int) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    """Find the tickets of every round in one fit; return their curves and masks by round."""
    torch.manual_seed(seed)
    last, steps = max(ROUNDS), epochs * len(train)
    curves, keep = Curves(tests, steps), Keep(steps)
    rounds = IterativeMagnitudePruning(
        {layer: 1 - survives**last for layer, survives in LAYERS.items()}, scope="layer",
        schedule=Geometric(start=epochs, end=last * epochs, every=epochs), rewind_to=0,
    )  # fmt: skip
    fit(Adam(lenet_300_100()), train, epochs * (last + 1), [rounds, curves, keep])
    return {ROUNDS[n]: curves.rounds[n] for n in ROUNDS}, keep.masks


def reinitialized(seed: int, masks: dict[str, Tensor], train: Batches, tests: Batches, epochs: int) -> dict:
    """Train other initial weights within a ticket's masks; return the curve."""
    torch.manual_seed(seed + 1000)
    module = Adam(lenet_300_100())
    apply_masks_(module, masks)
    curves = Curves(tests, epochs * len(train))
    fit(module, train, epochs, [IterativeMagnitudePruning(0.0, scope="global"), curves])
    return curves.rounds[0]


def table(results: dict) -> Table:
    """Mean accuracies over the seeds, early and at the end of a round."""
    rows = Table(
        "weights left, %", "ticket: early", "at the end", "drawn anew: early", "at the end", title="Test accuracy, %"
    )
    for level in ROUNDS.values():
        cells = []
        for arm in ("ticket", "drawn anew"):
            curves = [found[arm][level]["accuracy"] for found in results.values() if level in found.get(arm, {})]
            for point in (4, -1):  # after 500 steps, and after the last
                values = [curve[point] for curve in curves]
                spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.2f}{spread}" if values else "")
        rows.add_row(level, *cells)
    return rows


def draw(results: dict, path: Path) -> None:
    """Draw mean curves of tickets (solid) and of the same masks with other weights (broken), as in the paper."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, level in enumerate(ROUNDS.values()):
        colour = matplotlib.colormaps["viridis"](place / len(ROUNDS))
        for arm, style in (("ticket", "-"), ("drawn anew", "--")):
            curves = [found[arm][level]["accuracy"] for found in results.values() if level in found.get(arm, {})]
            if curves:
                average = torch.tensor(curves).mean(dim=0)
                steps = [EVERY * (point + 1) for point in range(len(average))]
                label = f"{level} %" if arm == "ticket" else f"{level} %, drawn anew"
                axes.plot(steps, average, style, color=colour, linewidth=1.2, label=label)
    axes.set(xlabel="optimizer steps", ylabel="test accuracy, %", ylim=(93, 99))
    axes.set_title(f"LeNet-300-100 on MNIST, mean of {len(results)} seeds", fontsize=10)
    axes.grid(color="0.9", linewidth=0.6)
    figure.legend(loc="outside right upper", fontsize=7, title="weights left", title_fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, train, print the table, write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="data folder, see README.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training images in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, labels = mnist(options.data, "train")
    tests = Batches(*mnist(options.data, "test"), 2000)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for seed in range(options.seeds):
        if "drawn anew" in results.get(str(seed), {}):
            continue
        train = Batches(images, labels, 60, train=True, seed=seed, crop=False)
        found, masks = tickets(seed, train, tests, options.epochs)
        results[str(seed)] = {"ticket": found}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        anew = {ROUNDS[n]: reinitialized(seed, masks[n], train, tests, options.epochs) for n in ROUNDS if n}
        results[str(seed)]["drawn anew"] = anew
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, options.json.with_suffix(".png"))
    Console().print(table(results))


if __name__ == "__main__":
    main()
