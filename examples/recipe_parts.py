"""Prune the network inside a larger LightningModule, and let it learn from the dense network.

python examples/recipe_parts.py            # an encoder beside a projection head and a memory that stay as they are
python examples/recipe_parts.py --distil   # the same, and the pruned network is trained to answer as the dense one did
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterL1Pruning, Linear
from lightning_prune.callbacks import DistillFromDense


class Contrastive(pl.LightningModule):
    """Two views of an image shall have one embedding; only the encoder is deployed later."""

    memory: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32),
        )  # fmt: skip
        self.projection = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 16))
        self.register_buffer("memory", torch.randn(256, 16))

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        one, two = self(images), self(images + 0.1 * torch.randn_like(images))
        against = torch.cat([F.normalize(two, dim=1), F.normalize(self.memory, dim=1)])
        return F.cross_entropy(F.normalize(one, dim=1) @ against.T / 0.1, torch.arange(len(images)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--distil", action="store_true", help="learn from the dense encoder after the pruning steps")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    module = Contrastive()
    callbacks: list[Callback] = [
        FilterL1Pruning(amount=0.5, target="flops", module="encoder", schedule=Linear(start=1, end=2))
    ]
    if options.distil:
        callbacks.append(DistillFromDense(module="encoder", loss="mse"))
    data = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16)), batch_size=16)
    trainer = pl.Trainer(max_epochs=4, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    kept = trainer.callback_metrics["prune/flops_kept"]
    distilled = trainer.callback_metrics.get("prune/distillation")
    print(f"{kept:.1%} of the encoder's FLOPs kept; projection: {module.projection[0].out_features} units")
    if distilled is not None:
        print(f"distillation loss in the last epoch: {distilled:.4f}")
    torch.save(module.encoder.state_dict(), "encoder.pt")


if __name__ == "__main__":
    main()
