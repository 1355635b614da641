"""Fine-tune a network of timm and prune half of its FLOPs on the way.

python examples/recipe_timm.py                                   # resnet18
python examples/recipe_timm.py --model vit_tiny_patch16_224
python examples/recipe_timm.py --pretrained --size 224           # downloads weights
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Linear, TaylorFilterPruning, load_state_dict_


class Classifier(pl.LightningModule):
    def __init__(self, model: str, size: int, pretrained: bool = False) -> None:
        super().__init__()
        more = {"img_size": size} if "vit" in model else {}
        self.net = timm.create_model(model, pretrained=pretrained, num_classes=10, **more)
        self.example_input_array = torch.zeros(1, 3, size, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def images(size: int) -> DataLoader:
    """Noise, so that the example runs anywhere: put your own data here."""
    return DataLoader(TensorDataset(torch.randn(32, 3, size, size), torch.randint(10, (32,))), batch_size=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--pretrained", action="store_true", help="start from trained weights, which are downloaded")
    parser.add_argument("--out", type=Path, default=Path("timm-pruned.pt"))
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    module = Classifier(options.model, options.size, options.pretrained)
    pruning = TaylorFilterPruning(amount=0.5, target="flops", scope="global", schedule=Linear(start=1, end=2))
    trainer = pl.Trainer(max_epochs=3, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, images(options.size))
    torch.save(module.net.state_dict(), options.out)

    # Elsewhere: build the full-size network, and load. It takes the pruned shapes.
    again = Classifier(options.model, options.size).net
    load_state_dict_(again, torch.load(options.out))
    image = torch.randn(1, 3, options.size, options.size)
    same = torch.equal(again.eval()(image), module.net.eval()(image))
    kept = trainer.callback_metrics["prune/flops_kept"]
    print(f"{kept:.1%} of the FLOPs kept; loaded again: {'the same' if same else 'different'} outputs")


if __name__ == "__main__":
    main()
