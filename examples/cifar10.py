"""Train a ResNet on CIFAR-10, prune half of its FLOPs with a guard on its accuracy, and measure the latency saved.

python examples/cifar10.py                                             # synthetic images, to try it
python examples/cifar10.py --data cifar-10-binary.tar.gz --epochs 40   # the real ones, from www.cs.toronto.edu/~kriz
"""

from __future__ import annotations

import argparse
import copy
import tarfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Cubic, MetricGuard, TaylorFilterPruning
from lightning_prune.analysis.latency_comparison import compare_latency

ONE_IMAGE = torch.zeros(1, 3, 32, 32)
MEAN, STD = torch.tensor([0.491, 0.482, 0.447]).view(3, 1, 1), torch.tensor([0.247, 0.243, 0.262]).view(3, 1, 1)


def from_archive(path: Path) -> tuple[TensorDataset, TensorDataset]:
    """Read the binary version of CIFAR-10: records of a label and 32 x 32 pixels, red, green, blue."""
    found: dict[str, list[np.ndarray]] = {"data": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".bin") and (file := archive.extractfile(member)):
                records = np.frombuffer(file.read(), dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                found[Path(member.name).name.partition("_")[0]].append(records)
    train, test = (torch.from_numpy(np.concatenate(records).copy()) for records in found.values())
    return dataset(train), dataset(test)


def dataset(records: Tensor) -> TensorDataset:
    return TensorDataset(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long())


def made_up(count: int) -> TensorDataset:
    """Return images of noisy stripes, with one direction and colour per class."""
    labels = torch.arange(count) % 10
    angle, phase = labels * torch.pi / 10, 2 * torch.pi * torch.rand(count)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    stripes = torch.sin(0.8 * along + phase[:, None, None])[:, None]
    colours = torch.stack([torch.cos(labels + shift) for shift in (0.0, 2.1, 4.2)], dim=1)[:, :, None, None]
    images = 128 + 40 * stripes + 15 * colours + 45 * torch.randn(count, 3, 32, 32)
    return TensorDataset(images.clamp(0, 255).to(torch.uint8), labels)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(*shortcut) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(pl.LightningModule):
    """ResNet of depth 6 n + 2 (He et al. 2015, sec. 4.2), with convolutions as shortcuts."""

    def __init__(self, n: int = 3, width: int = 16, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            *(
                Block(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s and b == 0 else 1)
                for s in range(3)
                for b in range(n)
            )
        )
        self.head = nn.Linear(4 * width, 10)
        self.example_input_array = ONE_IMAGE

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        images = (images / 255 - MEAN) / STD
        images = images.flip(3) if torch.rand(()) < 0.5 else images
        down, right = torch.randint(9, (2,)).tolist()
        images = F.pad(images, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]  # one crop for the batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = self((batch[0] / 255 - MEAN) / STD).argmax(dim=1) == batch[1]
        self.log("val_acc", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train and prune, then compare the latency of the dense and the pruned network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="cifar-10-binary.tar.gz; by default synthetic images")
    parser.add_argument("--examples", type=int, default=2000, help="how many images to make up (default: 2000)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("cifar10"), help="folder for logs and report")
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    console = Console()
    if options.data is None:
        console.print("No --data: training on made-up stripes, whose accuracy says nothing about CIFAR-10.")
        train, test = made_up(options.examples), made_up(500)
    else:
        train, test = from_archive(options.data)

    model = ResNet(width=options.width)
    dense = copy.deepcopy(model)
    end = max(2, options.epochs // 2)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[
            TaylorFilterPruning(amount=0.5, target="flops", scope="global", schedule=Cubic(1, end), max_amount=0.8),
            MetricGuard(monitor="val_acc", drop=0.1, patience=2),
        ],
        logger=CSVLogger(options.out, name=None),
        accelerator="cpu", enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    trainer.fit(model, DataLoader(train, batch_size=128, shuffle=True), DataLoader(test, batch_size=256))
    report = compare_latency(dense, model, ONE_IMAGE, batch_sizes=[1, 64])
    for timing in report.timings:
        console.print(f"latency left, batches of {timing.batch_size}: {timing.kept['pruned']:.0%}")
    if report.round_to is not None:
        console.print(f"With round_to={report.round_to} it would take {report.saves:.0%} less time.")
    flops = report.flops["pruned"] / report.flops["dense"]
    console.print(f"{float(trainer.callback_metrics['val_acc']):.1%} right with {flops:.1%} of the FLOPs")


if __name__ == "__main__":
    main()
