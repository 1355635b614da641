"""What gathering scores over a run means, whatever the criterion: when it listens, rests and is remembered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.measure.unit_statistics import UnitMeans
from lightning_prune.pruning.budget import Scores
from lightning_prune.structure import Structure

__all__ = ["Gathering", "Listener", "OverTheRun"]


class Listener:
    """What a run does as it goes; each way of gathering listens to what it needs."""

    def before_batch(self) -> None:
        """Forget what was seen outside training."""

    def after_batch(self) -> None:
        """Gather from the forward passes of one training step."""

    def before_backward(self) -> None:
        """Forget what backward passes outside the training step have left."""

    def after_backward(self, trainer: Trainer) -> None:
        """Gather from one backward pass."""

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather from the gradients that an optimizer is about to step by."""


class Gathering(Listener, ABC):
    """Where a callback's scores come from."""

    looks_at_training: str = ""
    """What of the training must have been seen since the last cut, if anything."""
    adding_up: bool = False
    """Whether scores are losses, so that those of several units add up."""

    @abstractmethod
    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return one score per unit of every group, ``(width,)``, the same on all processes; higher is kept longer."""

    @abstractmethod
    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Gather from nothing, or from what a checkpoint brought."""

    @abstractmethod
    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there is something to score by."""

    @abstractmethod
    def blind(self, pl_module: LightningModule) -> bool:
        """Tell whether weights have moved and nothing of it was seen."""

    @abstractmethod
    def gathered(self) -> dict[str, list[Any]] | None:
        """Return what a checkpoint shall remember, as ``name -> [total, count]``."""

    @abstractmethod
    def take_up(self, gathered: dict[str, list[Any]] | None) -> None:
        """Go on from what :meth:`gathered` returned, when watching starts next."""

    def amend(self, trainer: Trainer, gathered: dict[str, list[Any]] | None) -> None:
        """Keep of each sum this process's share of what all have gathered: the same file is read by all of them."""
        for sums in (gathered or {}).values() if trainer.world_size > 1 else ():
            device = trainer.strategy.root_device
            total, count = (
                trainer.strategy.reduce(torch.as_tensor(value).to(device), reduce_op="mean") for value in sums
            )
            sums[:] = total.cpu(), float(count)


class OverTheRun(Gathering, ABC):
    """Averages, over batches and processes, from one cut to the next."""

    def __init__(self) -> None:
        """Start from nothing."""
        self.means: UnitMeans | None = None
        self._brought: dict[str, list[Any]] | None = None  # by a checkpoint, until the model is traced
        self._structure: Structure | None = None
        self._hooks = ExitStack()
        self._versions: list[int] = []  # of the parameters when watching began: every step makes new ones

    @abstractmethod
    def sums(self, structure: Structure) -> dict[str, int]:
        """Return what is summed: name -> how many numbers."""

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Gather from nothing, or from what a checkpoint brought."""
        self.rest()
        self._structure = structure
        self.means = UnitMeans(self.sums(structure), pl_module.device)
        if self._brought is not None:
            self.means.take_up(self._brought)
            self._brought = None
        self._versions = [parameter._version for parameter in pl_module.parameters()]
        self.hook(pl_module, structure)

    def hook(self, pl_module: LightningModule, structure: Structure) -> None:
        """Put on the model what sees its passes."""

    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""
        self._hooks.close()
        self.means = self._structure = None

    @property
    def ready(self) -> bool:
        """Whether anything was seen since the last cut."""
        return self.means is not None and self.means.has_seen

    def blind(self, pl_module: LightningModule) -> bool:
        """Tell whether weights have moved and nothing of it was seen."""
        moved = self._versions != [parameter._version for parameter in pl_module.parameters()]
        return self.means is not None and not self.ready and moved

    def gathered(self) -> dict[str, list[Any]] | None:
        """Return the sums of this process."""
        return None if self.means is None else self.means.gathered()

    def take_up(self, gathered: dict[str, list[Any]] | None) -> None:
        """Keep what a checkpoint brought until the model is traced."""
        self._brought = gathered

    def found(self) -> dict[str, Tensor]:
        """Return the means over all processes."""
        assert self.means is not None  # ready was asked first
        return self.means.compute()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what belongs to this process alone."""
        return {**self.__dict__, "means": None, "_structure": None, "_hooks": ExitStack()}
