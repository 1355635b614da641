"""Small networks with data, of every kind of layer that devices treat in their own way, and a run of Lightning's."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import runs
from tests.mixtures import WIDTH, Mixture

CLASSES = 5


class Conv(nn.Module):
    """Convolutions: residual, depthwise, grouped and transposed, each before a norm with scales."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.grouped, self.norm4 = nn.Conv2d(8, 16, 3, groups=2, padding=1), nn.GroupNorm(4, 16)
        self.up, self.norm5 = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = x + F.relu(self.norm2(self.second(x)))
        x = F.max_pool2d(F.relu(self.norm3(self.depthwise(x))), 2)
        x = F.relu(self.norm4(self.grouped(x)))
        return self.head(F.relu(self.norm5(self.up(x))).mean((2, 3)))


class Attention(nn.Module):
    """An embedding and a transformer layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embedding(tokens))).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **arguments):
        super().__init__()
        self.into, self.layer = nn.Linear(4, 8), kind(8, 12, batch_first=True, **arguments)
        self.head = nn.Linear(12 * (2 if self.layer.bidirectional else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.into(x))[0][:, -1])


class Cells(nn.Module):
    """The cells of recurrent layers, called step by step."""

    def __init__(self):
        super().__init__()
        self.start, self.begin = nn.Linear(4, 12), nn.Linear(4, 10)
        self.lstm, self.gru, self.head = nn.LSTMCell(4, 12), nn.GRUCell(12, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.start(x[:, 0])
        state, out = (first, first), self.begin(x[:, 0])
        for step in x.unbind(1):
            state = self.lstm(step, state)
            out = self.gru(state[0], out)
        return self.head(out)


class Block(nn.Module):
    """A hidden layer beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), *(Block() for _ in range(4)), nn.Linear(8, CLASSES))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def _steps(count: int) -> Tensor:
    return torch.randn(count, 5, 4)


NETS = {
    "conv": (Conv, _images),
    "attention": (Attention, lambda count: torch.randint(11, (count, 6))),
    "lstm": (lambda: Recurrent(nn.LSTM), _steps),
    "gru": (lambda: Recurrent(nn.GRU), _steps),
    "deep lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), _steps),
    "bare lstm": (lambda: Recurrent(nn.LSTM, bias=False), _steps),
    "cells": (Cells, _steps),
    "blocks": (blocks, lambda count: torch.randn(count, 4)),
    "mlp": (mlp, lambda count: torch.randn(count, 4)),
}


def made(name: str, device: str) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    """A network, one example and two batches with labels, all on a device."""
    make, draw = NETS[name]
    torch.manual_seed(0)
    model, x, labels = make(), draw(32), torch.randint(CLASSES, (32,))
    x, labels = x.to(device), labels.to(device)
    return model.to(device), x[:1], list(zip(x.split(16), labels.split(16), strict=True))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Net(runs.Net):
    """The network of the tests of runs, with a metric to watch."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr, dropout=0.0)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())


class Rich(Net):
    """The same with what some callbacks ask for: mixtures that can be left out, and a schedule of the learning rate."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr)
        self.hidden = nn.Linear(6, WIDTH)
        self.mixtures = nn.ModuleList(Mixture(4, style=style) for style in ("loop", "fused"))
        self.head = nn.Linear(WIDTH, runs.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(images))))).mean((2, 3))
        x = self.hidden(x)
        for mixture in self.mixtures:
            x = x + mixture(x)
        return self.head(x)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Normed(Net):
    """The same with a norm behind each convolution, and no hidden layer without one."""

    def __init__(self, lr: float = 0.05):
        super().__init__(lr)
        del self.hidden
        self.norm2, self.head = nn.BatchNorm2d(6), nn.Linear(6, runs.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.second(F.relu(self.norm(self.first(images))))))
        return self.head(x.mean((2, 3)))


class Data(pl.LightningDataModule):
    """The data of the tests of runs."""

    def train_dataloader(self):
        return runs.batches(16)

    def val_dataloader(self):
        return runs.batches(16, seed=8)
