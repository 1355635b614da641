"""Random runs: a module, callbacks of ours and of Lightning, and settings of the Trainer, drawn together."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import callbacks as lightning_callbacks

from lightning_prune import (
    Cubic,
    FilterL1Pruning,
    FilterPruning,
    Geometric,
    IterativeMagnitudePruning,
    Linear,
    MetricGuard,
    OBSOneShot,
    OneCycle,
    OneShot,
    TaylorFilterPruning,
)
from lightning_prune.callbacks import (
    DistillFromDense,
    LayerPruning,
    LearningRateRewinding,
    PruningEarlyStopping,
    WeightSharing,
)
from tests.newer_lightning import has_averaging
from tests.runs import Attentive, Depthwise, Known, Net

EPOCHS = 6


class ByHand(Net):
    """Steps two optimizers by hand."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        early = torch.optim.Adam([*self.first.parameters(), *self.norm.parameters()], 1e-2)
        late = [*self.second.parameters(), *self.hidden.parameters(), *self.head.parameters()]
        return [early, torch.optim.RMSprop(late, 1e-3)], [torch.optim.lr_scheduler.StepLR(early, 2)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss, on_step=False, on_epoch=True)


class Scheduled(Net):
    """Has a learning rate that changes with every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Holding(LightningModule):
    """Holds the network that is trained, beside a frozen teacher."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.net, self.teacher = Net(**arguments), Net(**arguments).requires_grad_(False)

    def forward(self, images: Any) -> Any:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        answer = self(batch[0])
        loss = F.cross_entropy(answer, batch[1]) + 0.1 * F.mse_loss(answer, self.teacher.eval()(batch[0]))
        self.log("loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss, "answer": answer.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


MODULES = (Net, Known, Depthwise, Attentive, ByHand, Scheduled, Holding)
CRITERIA = ("l2", "apoz", "obd", "obs", "output_change", "activation_mean", "random")
SETTINGS: dict[str, tuple[float, tuple[Any, ...]]] = {
    "accumulate_grad_batches": (0.2, (2, 3)),
    "gradient_clip_val": (0.2, (0.5,)),
    "precision": (0.2, ("bf16-mixed", "bf16-true")),
    "val_check_interval": (0.1, (0.5,)),
    "check_val_every_n_epoch": (0.1, (2,)),
    "limit_train_batches": (0.1, (2, 3)),
    "overfit_batches": (0.05, (2,)),
    "fast_dev_run": (0.05, (True,)),
    "detect_anomaly": (0.05, (True,)),
    "inference_mode": (0.1, (False,)),
    "num_sanity_val_steps": (0.2, (2,)),
    "reload_dataloaders_every_n_epochs": (0.1, (1,)),
    "limit_val_batches": (0.05, (1,)),
}
"""Settings of a Trainer: how often they are drawn, and from what."""


@dataclass
class RandomRun:
    """What was drawn.

    Attributes:
        module: Makes the module.
        ours: Callbacks of this package.
        others: Callbacks of Lightning.
        settings: Arguments of the Trainer.
    """

    module: Callable[..., LightningModule]
    ours: list[Callback]
    others: list[Callback]
    settings: dict[str, Any]

    @property
    def callbacks(self) -> list[Callback]:
        """All callbacks, in an order that was drawn."""
        return [*self.ours, *self.others]


def draw_run(seed: int, folder: Path) -> RandomRun:
    """Draw a run; the same seed gives the same one, with new callbacks."""
    r = random.Random(seed)
    module = r.choice(MODULES)
    ours = [*_pruning(r), *_companions(r, module)]
    r.shuffle(ours)
    settings = {name: r.choice(values) for name, (chance, values) in SETTINGS.items() if r.random() < chance}
    return RandomRun(module, ours, _others(r, folder), settings)


def _schedule(r: random.Random) -> Any:
    by_steps = Cubic(1, 13, every=r.choice([1, 2, 3]), by="steps")
    return r.choice([OneShot(r.choice([1, 2])), Linear(1, 3), Cubic(1, 3), Geometric(1, 4), OneCycle(1, 4), by_steps])


def _pruning(r: random.Random) -> list[Callback]:
    amount, target = r.choice([0.3, 0.5, 0.7]), r.choice(["filters", "params", "flops"])
    schedule, scope = _schedule(r), r.choice(["layer", "global"])
    filters = {"amount": amount, "target": target, "schedule": schedule, "scope": scope}
    criterion, repair = r.choice(CRITERIA), r.choice([None, None, True])
    kinds: list[Callable[[], list[Callback]]] = [
        lambda: [FilterL1Pruning(**filters)],
        lambda: [TaylorFilterPruning(**filters)],
        lambda: [TaylorFilterPruning(**filters, form="activations")],
        lambda: [FilterPruning(**filters, criterion=criterion, repair=repair)],
        lambda: [FilterL1Pruning(amount, target="flops", schedule=schedule, layers=True)],
        lambda: [FilterL1Pruning(amount, target=target, schedule=Linear(1, 3), fade_steps=3)],
        lambda: [IterativeMagnitudePruning(amount, schedule=schedule, scope=scope)],
        lambda: [IterativeMagnitudePruning(amount, schedule=Geometric(2, 5), rewind_to=r.choice([0, 2]))],
        lambda: [IterativeMagnitudePruning(pattern="2:4", schedule=OneShot(1))],
        lambda: [OBSOneShot(amount)],
        lambda: [LayerPruning(amount, schedule=schedule)],
        lambda: [IterativeMagnitudePruning(0.4, schedule=Linear(1, 3)), FilterL1Pruning(0.4, schedule=Linear(1, 3))],
    ]
    return r.choice(kinds)()


def _companions(r: random.Random, module: Any) -> list[Callback]:
    drawn: list[Callback] = []
    if r.random() < 0.25:
        drawn.append(MetricGuard("val_loss", r.choice([0.0, 0.5, 100.0])))
    if r.random() < 0.15 and module is not ByHand:
        drawn.append(DistillFromDense())
    if r.random() < 0.2 and module in (Scheduled, Holding):
        drawn.append(LearningRateRewinding())
    if r.random() < 0.15:
        drawn.append(WeightSharing())
    if r.random() < 0.15:
        drawn.append(PruningEarlyStopping("val_loss", patience=3, mode="min"))
    return drawn


def _others(r: random.Random, folder: Path) -> list[Callback]:
    drawn: list[Callback] = [
        lightning_callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    ]
    if has_averaging and r.random() < 0.25:
        drawn.append(lightning_callbacks.EMAWeightAveraging(decay=0.8))
    if r.random() < 0.15:
        drawn.append(lightning_callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2))
    if r.random() < 0.1:
        drawn.append(lightning_callbacks.GradientAccumulationScheduler({0: 1, 2: 2}))
    r.shuffle(drawn)
    return drawn
