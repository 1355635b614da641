"""A short training that is the same whenever it is taken up again, and the callbacks that prune it; kills nothing.

Lightning's checkpoints hold neither random numbers nor, in the middle of an epoch, where a loader was. The module seeds
itself before every batch and the loader tells where it is, so that whatever differs after a resume is somebody's fault.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import (
    FilterL1Pruning,
    FilterPruning,
    Geometric,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    TaylorFilterPruning,
)
from lightning_prune.surgery import recipes_in

EPOCHS, BATCHES, CLASSES = 5, 4, 3
IMAGE = (2, 6, 6)


def _averaging() -> list[Callback]:
    """Return a callback that averages weights, which Lightning has from 2.6 on."""
    kind = getattr(callbacks, "EMAWeightAveraging", None)
    return [] if kind is None else [kind(decay=0.8)]


CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "l1": lambda: [FilterL1Pruning(0.5, target="flops", schedule=Linear(1, 3))],
    "taylor": lambda: [TaylorFilterPruning(0.5, schedule=Linear(1, 3), scope="global")],
    "taylor activations": lambda: [TaylorFilterPruning(0.5, schedule=Linear(1, 3), form="activations", scope="global")],
    "apoz": lambda: [FilterPruning(0.5, criterion="apoz", schedule=Linear(1, 3), recalibrate=2)],
    "magnitude": lambda: [IterativeMagnitudePruning(0.8, schedule=Geometric(1, 3), scope="global")],
    "lottery": lambda: [IterativeMagnitudePruning(0.8, schedule=Geometric(1, 3), rewind_to=2, scope="global")],
    "obs": lambda: [OBSOneShot(0.5, epoch=2, batches=2, scope="global")],
    # a loss that never may rise: some cuts come back, and some do not
    "guard": lambda: [
        MetricGuard("val_loss", 0.01, "min", then="halve"),
        FilterL1Pruning(0.5, schedule=Linear(1, 4)),
    ],
    "all at once": lambda: [
        *_averaging(),
        FilterL1Pruning({"first": 0.5}, schedule=Linear(1, 3)),
        IterativeMagnitudePruning(0.7, schedule=Linear(1, 3), ignore=["head"], scope="global"),
    ],
}


class Net(pl.LightningModule):
    """Two convolutions, BatchNorm, dropout, a hidden layer and a head."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden, self.drop, self.head = nn.Linear(6, 10), nn.Dropout(0.2), nn.Linear(10, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.second(x)).mean(dim=(2, 3))
        return self.head(self.drop(F.relu(self.hidden(x))))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 * self.current_epoch + batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Batches:
    """Batches in another order every epoch, which know how many of them were handed out.

    Lightning tells the epoch to what it takes for a sampler, and gives ``state_dict`` back in the middle of an epoch.
    """

    def __init__(self, seed: int, count: int = BATCHES, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        colours = 2 * torch.randn(CLASSES, 2, 1, 1, generator=torch.Generator().manual_seed(3))
        self.labels = torch.randint(CLASSES, (count, size), generator=generator)
        self.images = colours[self.labels] + torch.randn(count, size, *IMAGE, generator=generator)
        self.epoch, self.given, self.begin = 0, 0, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        self.given, self.begin = self.begin, 0
        for index in order[self.given :].tolist():
            self.given += 1
            if self.given == len(self):
                self.epoch, self.given = self.epoch + 1, 0
            yield self.images[index], self.labels[index]

    @property
    def sampler(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.given, self.begin = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given = state["epoch"], state["given"]
        self.begin = self.given  # of the next pass alone, as torchdata's StatefulDataLoader has it


class WithinEpochs(ModelCheckpoint):
    """Saves after every step but an epoch's last: Lightning counts one epoch too few in what is taken up from there."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args)


def trainer(*callbacks: Callback, **arguments: Any) -> pl.Trainer:
    """Return a silent trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
    }
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def train(folder: Path, case: str, every: str) -> dict[str, Any]:
    """Train from the last checkpoint of a folder, or from the start if there is none, and return what came of it.

    Gradients are accumulated where checkpoints are written every ``epoch``: those that a resumed run writes every
    ``step`` may fall, by Lightning, between two batches of one step, and the gradients so far are lost.
    """
    savers: list[Callback] = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)]
    if every == "step":
        savers.append(WithinEpochs(folder, filename="{step}", save_top_k=-1, save_last=True, every_n_train_steps=1))
    torch.manual_seed(0)
    module = Net()
    made = trainer(*CALLBACKS[case](), *savers, enable_checkpointing=True, accumulate_grad_batches=3 - len(savers))
    made.fit(module, Batches(7), DataLoader(list(Batches(8, 2)), None), ckpt_path="last")
    return outcome(module, made)


def outcome(module: pl.LightningModule, made: pl.Trainer) -> dict[str, Any]:
    """Return weights, masks, attributes and momentum as plain tensors and lists."""
    state = module.state_dict()
    recipe = recipes_in(state)
    momenta = [optimizer.state_dict()["state"] for optimizer in made.optimizers]
    return {"weights": dict(state), "recipe": recipe, "momenta": momenta, "steps": made.global_step}
