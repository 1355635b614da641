"""Prune a detector of torchvision while it trains.

python examples/recipe_detection.py
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from lightning_prune import FilterL1Pruning, Linear, count_flops

SIDE = 160
Target = dict[str, Tensor]


class Detector(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # weights="DEFAULT" starts from trained weights, which are downloaded
        self.net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)

    def forward(self, images: list[Tensor]) -> list[Target]:
        return self.net(images)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.net(images, targets)
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


def pictures() -> DataLoader:
    """Noise with a box: put your own data here."""
    rows: Any = []
    for _ in range(8):
        target = {"boxes": torch.tensor([[20.0, 20.0, 90.0, 90.0]]), "labels": torch.randint(1, 4, (1,))}
        rows.append((torch.rand(3, SIDE, SIDE), target))
    return DataLoader(rows, batch_size=4, collate_fn=lambda rows: tuple(map(list, zip(*rows, strict=True))))


def main() -> None:
    pl.seed_everything(0, verbose=False)
    module = Detector()
    # forward takes a list of images: that, and not a batch with its targets, is what is traced
    example = ([torch.rand(3, SIDE, SIDE)],)
    dense = count_flops(module.eval(), example).total
    pruning = FilterL1Pruning(
        amount=0.3, target="flops", scope="global", schedule=Linear(start=1, end=2), example_inputs=example
    )
    trainer = pl.Trainer(max_epochs=3, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module.train(), pictures())
    kept = count_flops(module.eval(), example).total / dense
    with torch.inference_mode():
        (found,) = module([torch.rand(3, SIDE, SIDE)])
    print(f"{kept:.1%} of the FLOPs kept; {len(found['boxes'])} boxes found")


if __name__ == "__main__":
    main()
