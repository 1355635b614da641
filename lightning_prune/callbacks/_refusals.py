"""Says which runs cannot be pruned, before they start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from lightning_prune.arguments import amount_by_group, with_ignored
from lightning_prune.errors import PruningError
from lightning_prune.schedules import Schedule
from lightning_prune.structure import Structure

if TYPE_CHECKING:
    from lightning_prune.callbacks._pruning import StructuredPruning

__all__ = ["leads", "pruning_callbacks", "refuse_overlap", "refuse_run"]


def refuse_run(where: str, schedule: Schedule, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse strategies, ways of optimizing and lengths of training that pruning cannot work with.

    Raises:
        PruningError: Saying what to use instead.
    """
    if trainer.strategy.restore_checkpoint_after_setup:
        raise PruningError(
            f"{where}: {type(trainer.strategy).__name__} splits parameters into shards, from which no unit can be cut. "
            "Prune on one device or with strategy='ddp', then shard the slim model."
        )
    if not pl_module.automatic_optimization:
        raise PruningError(
            f"{where}: {type(pl_module).__name__} optimizes manually, so a cut could fall between its backward passes. "
            "Use automatic optimization, or call lightning_prune.prune_filters between two of your steps."
        )
    if any(type(callback).__name__ == "ModelPruning" for callback in trainer.callbacks):
        raise PruningError(f"{where} and ModelPruning contradict: one cuts what the other wraps. Use one of them.")
    last, epochs = schedule.last_epoch, trainer.max_epochs
    if not trainer.fast_dev_run and epochs is not None and 0 < epochs <= last:
        raise PruningError(
            f"{where}: {schedule} is complete only before epoch {last} (counted from 0), but training ends after "
            f"max_epochs={epochs}. End the schedule at epoch {epochs - 1} or before, or train for longer."
        )


def refuse_overlap(mine: StructuredPruning, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> None:
    """Refuse two callbacks that would each set the width of the same channels.

    Raises:
        PruningError: Naming both and the channels.
    """
    for other in pruning_callbacks(trainer):
        shared = set() if other is mine else _claims(mine, pl_module, structure) & _claims(other, pl_module, structure)
        if shared:
            raise PruningError(
                f"{mine!r} and {other!r} both prune {min(shared)}, so the amount of one contradicts the other's. "
                "Use one callback, or part the modules between them by ignore= or amount={pattern: ...}."
            )


def pruning_callbacks(trainer: Trainer) -> list[StructuredPruning]:
    """Return the trainer's callbacks that cut."""
    from lightning_prune.callbacks._pruning import StructuredPruning

    return [callback for callback in trainer.callbacks if isinstance(callback, StructuredPruning)]


def leads(callback: StructuredPruning, trainer: Trainer) -> bool:
    """Tell whether this is the last of our callbacks, which logs for all: values logged twice would be averaged."""
    return pruning_callbacks(trainer)[-1] is callback


def _claims(callback: StructuredPruning, pl_module: LightningModule, structure: Structure) -> set[str]:
    structure = with_ignored(pl_module, structure, callback.ignore)
    amount = amount_by_group(structure, callback.amount)
    return {name for name, a in amount.items() if a} if isinstance(amount, Mapping) else set(structure.groups)
