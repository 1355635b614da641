"""Train a small network on scikit-learn's digits, prune half of its FLOPs, and compare it with the dense network.

python examples/digits.py                        # all settings are in this file
python examples/digits_cli.py fit --config examples/digits.yaml   # the same run from YAML
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Cubic, FilterL1Pruning, count_flops

ONE_IMAGE = torch.zeros(1, 1, 8, 8)


class Digits(pl.LightningDataModule):
    """The 1,797 images of 8x8 pixels that come with scikit-learn; every fifth is kept for testing."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        data = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train_set = TensorDataset(*(tensor[~held_out] for tensor in data))
        self.test_set = TensorDataset(*(tensor[held_out] for tensor in data))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, 512)


class DigitsNet(pl.LightningModule):
    """A small residual network."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(self._block(width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def train(net: DigitsNet, epochs: int, folder: Path, *callbacks: Callback) -> list[dict[str, str]]:
    """Train and return the rows that the CSV logger wrote at the end of every epoch."""
    logger = CSVLogger(folder, name=None, version="pruned" if callbacks else "dense")
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(net, datamodule=Digits())
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    merged: dict[str, dict[str, str]] = {}
    for row in rows:
        merged.setdefault(row["epoch"], {}).update({key: value for key, value in row.items() if value})
    return list(merged.values())


@torch.inference_mode()
def latencies(nets: Sequence[nn.Module], images: Tensor, rounds: int = 40) -> list[float]:
    """Return the median milliseconds of one call of each network, measured in turn."""
    seconds: list[list[float]] = [[] for _ in nets]
    for _ in range(rounds):
        for net, taken in zip(nets, seconds, strict=True):
            start = time.perf_counter()
            net(images)
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in seconds]


def compare(dense: DigitsNet, pruned: DigitsNet, accuracies: tuple[float, float]) -> Table:
    """Print the pruned and the dense network side by side."""
    nets = [dense.eval(), pruned.eval()]
    flops = [count_flops(net, ONE_IMAGE).total for net in nets]
    params = [sum(p.numel() for p in net.parameters()) for net in nets]
    times = latencies(nets, torch.rand(256, 1, 8, 8))
    table = Table(title="digits: dense against pruned while training")
    for heading in ("", "dense", "pruned", "ratio"):
        table.add_column(heading, justify="right")
    table.add_row(
        "test accuracy", *(f"{100 * a:.2f} %" for a in accuracies), f"{100 * (accuracies[1] - accuracies[0]):+.2f}"
    )
    table.add_row("params", *(f"{n:,}" for n in params), f"{params[1] / params[0]:.3f}")
    table.add_row("FLOPs, one image", *(f"{n:,}" for n in flops), f"{flops[1] / flops[0]:.3f}")
    table.add_row("latency, 256 images", *(f"{t:.2f} ms" for t in times), f"{times[1] / times[0]:.3f}")
    return table


def draw(dense: list[dict[str, str]], pruned: list[dict[str, str]], path: Path) -> None:
    """Draw accuracy and FLOPs against epochs."""
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(6.4, 4.8), height_ratios=(3, 2), layout="constrained"
    )
    for rows, label, colour in ((dense, "dense", "0.6"), (pruned, "pruned while training", "C0")):
        top.plot([100 * float(row["val_acc"]) for row in rows], color=colour, label=label)
    top.set(ylabel="test accuracy, %", ylim=(80, 100.5))
    top.legend(loc="lower right")
    epochs = range(len(pruned))
    for key, label, style in (("prune/flops_kept", "FLOPs", "C1-"), ("prune/params_kept", "params", "C2--")):
        bottom.step(epochs, [100 * float(row[key]) for row in pruned], style, where="mid", label=label)
    bottom.set(xlabel="epoch", ylabel="left, %", ylim=(0, 105))
    bottom.legend(loc="lower left")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train twice from the same start, dense and pruned, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the FLOPs that leaves")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder for the picture and the logs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(num_workers|does not have many workers|logging interval).*")
    pl.seed_everything(0, verbose=False)
    dense = DigitsNet()
    pruned = copy.deepcopy(dense)

    started = time.perf_counter()
    dense_rows = train(dense, options.epochs, options.out)
    schedule = Cubic(start=options.epochs // 6, end=options.epochs // 2, every=2)
    pruning = FilterL1Pruning(amount=options.amount, target="flops", schedule=schedule, example_inputs=ONE_IMAGE)
    pruned_rows = train(pruned, options.epochs, options.out, pruning)

    picture = options.out / "digits.png"
    draw(dense_rows, pruned_rows, picture)
    console = Console()
    console.print(compare(dense, pruned, (float(dense_rows[-1]["val_acc"]), float(pruned_rows[-1]["val_acc"]))))
    console.print(f"Both runs took {time.perf_counter() - started:.0f} s. The curve is in {picture}.")


if __name__ == "__main__":
    main()
