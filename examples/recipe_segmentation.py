"""Train a U-Net of segmentation_models_pytorch, prune half of its FLOPs on the way, and load it again.

python examples/recipe_segmentation.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterL1Pruning, Linear, load_state_dict_

SIZE = 64


def unet() -> torch.nn.Module:
    """No trained weights, so that the example runs offline: encoder_weights="imagenet" for yours."""
    return smp.Unet("resnet18", encoder_weights=None, classes=1)


class Segmenter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = unet()
        self.loss = smp.losses.DiceLoss("binary", from_logits=True)
        self.example_input_array = torch.zeros(1, 3, SIZE, SIZE)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        return self.loss(self(images), masks)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def discs(count: int = 32) -> DataLoader:
    """Bright discs in noise, and where they are: put your own images and masks here."""
    rows = torch.arange(SIZE)[:, None]
    columns = torch.arange(SIZE)
    centres = torch.randint(16, 48, (count, 2))
    distances = (rows - centres[:, :1, None]) ** 2 + (columns - centres[:, 1:, None]) ** 2
    masks = (distances < 12**2).float()[:, None]
    return DataLoader(TensorDataset(0.3 * torch.randn(count, 3, SIZE, SIZE) + masks, masks), batch_size=8, shuffle=True)


def overlap(net: torch.nn.Module, loader: DataLoader) -> float:
    """Return the intersection over union of what is predicted and what is there."""
    both = either = 0.0
    with torch.no_grad():
        for images, masks in loader:
            found, there = net.eval()(images) > 0, masks > 0
            both += float((found & there).sum())
            either += float((found | there).sum())
    return both / either


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("unet-pruned.pt"))
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    module, loader = Segmenter(), discs()
    pruning = FilterL1Pruning(amount=0.5, target="flops", schedule=Linear(start=1, end=3))
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader)
    torch.save(module.net.state_dict(), options.out)

    # Elsewhere: build the full-size network, and load. It takes the pruned shapes.
    again = unet()
    load_state_dict_(again, torch.load(options.out))
    image = torch.randn(1, 3, SIZE, SIZE)
    same = torch.equal(again.eval()(image), module.net.eval()(image))
    kept = trainer.callback_metrics["prune/flops_kept"]
    found = overlap(module.net, loader)
    print(f"{kept:.1%} of the FLOPs kept; IoU {found:.2f}; loaded again: {'the same' if same else 'different'} outputs")


if __name__ == "__main__":
    main()
