"""Knows what a callback must offer to judge pruning steps; knows no metric."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.engine.packages import AnyCallback

__all__ = ["Guard", "guards"]


class Guard(AnyCallback, ABC):
    """Base of the callbacks that decide whether a pruning step is kept."""

    @abstractmethod
    def before_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the pruning step is about to change."""

    @abstractmethod
    def judge(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Roll the last pruning step back if it did harm; return whether it is still on probation."""


def guards(trainer: Trainer) -> list[Guard]:
    """Return the trainer's guards."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Guard)]  # type: ignore[attr-defined]
