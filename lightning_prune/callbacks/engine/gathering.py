"""What gathering scores over a run means, whatever the criterion: when it listens, rests and is saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.engine.step import Traced
from lightning_prune.pruning.budget import Scores
from lightning_prune.structure import Structure


class Gathering:
    """Where a callback's scores come from.

    Attributes:
        looks_at_training: What of the training must be seen before a pruning step, if anything.
        reads_parts: Whether it can be seen of a model that tensor parallelism splits.
        adding_up: Whether scores are losses, so that those of several units add up.
        traces: What of the module runs on training batches.
    """

    looks_at_training: str = ""
    reads_parts: bool = True
    adding_up: bool = False
    traces: Traced = "forward"

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return one score per unit of every group, ``(width,)``, the same on all processes; higher is kept longer."""
        raise NotImplementedError

    def rehearse(self, pl_module: LightningModule, structure: Structure, batch: Any) -> None:
        """Refuse a module that could not be scored once a pruning step is due, on a training batch."""

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Start from nothing, or from what a checkpoint brought."""

    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""

    @property
    def ready(self) -> bool:
        """Whether there is something to score by."""
        return True

    def blind(self, pl_module: LightningModule) -> bool:
        """Return whether weights have changed and nothing of it was seen."""
        return False

    def unseen(self) -> list[str]:
        """Return the groups that passes so far took part with and did not show, by name."""
        return []

    def after_split(self) -> None:
        """Go on where FSDP2 has split the model again, into parameters that are other objects."""

    def gathered(self) -> dict[str, list[Any]] | None:
        """Return the sums to save in a checkpoint, as ``name -> [total, count]``."""
        return None

    def take_up(self, gathered: dict[str, list[Any]] | None) -> None:
        """Restore what :meth:`gathered` returned, when watching starts next."""

    def before_backward(self, loss: Tensor) -> None:
        """Look at a loss before it is differentiated."""

    def after_backward(self, trainer: Trainer) -> None:
        """Look at the gradients of one backward pass."""

    def before_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients that an optimizer is about to step by."""

    def amend(self, trainer: Trainer, gathered: dict[str, list[Any]] | None) -> None:
        """Keep of each sum this process's share of what all have gathered: the same file is read by all of them."""
        if gathered is None or trainer.world_size == 1:
            return
        device = trainer.strategy.root_device
        for sums in gathered.values():
            total, count = (
                trainer.strategy.reduce(torch.as_tensor(value).to(device), reduce_op="mean") for value in sums
            )
            sums[:] = total.cpu(), float(count)
