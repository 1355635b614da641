"""Declares what callbacks beside those that prune must offer: to judge pruning steps, or to follow them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.callbacks.engine.packages import AnyCallback
from lightning_prune.surgery import Cut

__all__ = ["Companion", "Guard", "companions", "guards"]


class Companion(AnyCallback):
    """Base of the callbacks that are told of pruning steps."""

    def before_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the pruning step is about to change."""

    def after_cut(self, trainer: Trainer, pl_module: LightningModule, cut: Cut) -> None:
        """Follow a cut of the model."""

    def rollback_state(self) -> Any:
        """Return what a cut changes of this callback's own state."""

    def rollback(self, state: Any) -> None:
        """Follow a model that is as it was when the state was asked for."""


class Guard(Companion, ABC):
    """Base of the callbacks that decide whether a pruning step is kept."""

    @abstractmethod
    def judge(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Roll the last pruning step back if it did harm; return whether it is still on probation."""


def companions(trainer: Trainer) -> list[Companion]:
    """Return the trainer's callbacks that are told of pruning steps."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Companion)]  # type: ignore[attr-defined]


def guards(trainer: Trainer) -> list[Guard]:
    """Return the trainer's guards."""
    return [companion for companion in companions(trainer) if isinstance(companion, Guard)]
