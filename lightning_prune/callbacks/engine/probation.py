"""What a callback must offer so that cuts are made on probation."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.engine.packages import AnyCallback

__all__ = ["Guard", "guards"]


class Guard(AnyCallback, ABC):
    """Base of the callbacks that decide whether a cut stays."""

    @abstractmethod
    def before_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what the cut is about to change."""

    @abstractmethod
    def judge(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Take the last cut back if it did harm; return whether it is still on probation."""


def guards(trainer: Trainer) -> list[Guard]:
    """Return the trainer's guards."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Guard)]  # type: ignore[attr-defined]
