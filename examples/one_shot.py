"""Trains a small network on scikit-learn's digits, then zeroes most of its weights at once, by size and by surgery.

python examples/one_shot.py
"""

from __future__ import annotations

import argparse
import copy

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import prune_obs, prune_weights


class Perceptron(pl.LightningModule):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main() -> None:
    """Train, prune, and set the accuracies side by side."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    test = torch.arange(len(y)) % 5 == 0

    dense = Perceptron()
    trainer = pl.Trainer(
        max_epochs=options.epochs, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(dense, DataLoader(TensorDataset(x[~test], y[~test]), batch_size=64, shuffle=True))

    def accuracy(model: nn.Module) -> float:
        with torch.inference_mode():
            return float((model(x[test]).argmax(dim=1) == y[test]).float().mean())

    table = Table("weights zeroed", "by magnitude", "by second-order surgery", title=f"dense: {accuracy(dense):.1%}")
    for amount in (0.5, 0.7, 0.8, 0.9):
        small, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
        prune_weights(small, amount, scope="global")
        # looks at inputs alone: no labels, no training
        prune_obs(repaired, amount, scope="global", batches=[x[~test]], progress=False)
        table.add_row(f"{amount:.0%}", f"{accuracy(small):.1%}", f"{accuracy(repaired):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
