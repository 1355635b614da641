"""Trains and tests an image classifier for the benchmarks; knows nothing of pruning."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Classifier", "accuracy", "fit"]

TEMPERATURE = 2.0


class Classifier(pl.LightningModule):
    """A network trained with cross-entropy and SGD.

    Args:
        net: Maps images ``(N, C, H, W)`` to scores ``(N, classes)``.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on every parameter.
        anneal: Whether the learning rate falls to zero along a cosine; it is constant otherwise.
        teacher: A network in eval mode whose answers are learned beside the labels (Hinton et al. 2015), at the
            temperature and weight that :class:`~lightning_prune.callbacks.DistillFromDense` has by default.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        anneal: bool = False,
        teacher: nn.Module | None = None,
    ):
        super().__init__()
        self.net = net
        self.teach = [] if teacher is None else [teacher]  # in a list, which is no part of the module
        self.lr, self.momentum, self.weight_decay, self.anneal = lr, momentum, weight_decay, anneal

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        del batch_idx  # unused, but part of the hook
        images, labels = batch
        scores = self(images)
        loss = F.cross_entropy(scores, labels)
        for teacher in self.teach:
            with torch.no_grad():
                aim = F.log_softmax(teacher(images) / TEMPERATURE, dim=1)
            answer = F.log_softmax(scores / TEMPERATURE, dim=1)
            loss = loss + TEMPERATURE**2 * F.kl_div(answer, aim, reduction="batchmean", log_target=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        if not self.anneal:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    lr: float,
    anneal: bool = False,
    teacher: nn.Module | None = None,
) -> None:
    """Train ``net`` in place, all of it in train mode, for some passes over ``batches``."""
    net.train()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net, lr=lr, anneal=anneal, teacher=teacher), batches)


@torch.inference_mode()
def accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of images that ``net`` puts into the right class, in eval mode; its mode is given back."""
    training = net.training
    net.eval()
    right = total = 0
    for images, labels in batches:
        right += int((net(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    net.train(training)
    return right / total
