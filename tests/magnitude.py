"""Zeros of the networks of :mod:`tests.runs`: how many there are, counted wherever somebody may look."""

import math

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
)

from lightning_prune import (
    IterativeMagnitudePruning,
    Linear,
)
from tests.runs import Net

SIZES = {"first.weight": 144, "second.weight": 432, "hidden.weight": 60, "head.weight": 30}
TOTAL = sum(SIZES.values())


def gone_of(share, size=TOTAL):
    """As many weights as are at least the share."""
    return math.ceil(share * size - 1e-9)


def pruning(**arguments):
    return IterativeMagnitudePruning(**{"amount": 0.8, "scope": "global", "schedule": Linear(0, 1), **arguments})


def zeros(module):
    """How many entries of each weight are exactly zero."""
    return {name: int((module.get_parameter(name) == 0).sum()) for name in SIZES}


class Zeros(Callback):
    """Counts zeros wherever another callback may look."""

    def __init__(self):
        self.seen = []

    def note(self, trainer, pl_module, *_):
        self.seen.append((trainer.current_epoch, sum(zeros(pl_module).values())))

    on_train_batch_start = on_before_backward = on_before_zero_grad = on_train_batch_end = note
    on_validation_batch_start = on_validation_end = on_train_epoch_end = on_train_end = note

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        state = checkpoint["state_dict"]
        self.seen.append((trainer.current_epoch, sum(int((state[name] == 0).sum()) for name in SIZES)))


class WithAdam(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1, fused=True)


class Two(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self, lr=0.05, dropout=0.0):
        super().__init__(lr, dropout)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        images, labels = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(images), labels))
            optimizer.step()

    def configure_optimizers(self):
        early = [*self.first.parameters(), *self.norm.parameters()]
        late = [*self.second.parameters(), *self.hidden.parameters(), *self.head.parameters()]
        return torch.optim.SGD(early, self.hparams.lr, momentum=0.9), torch.optim.Adam(late, 0.01)


class Falling(Net):
    """Its learning rate falls at every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]
