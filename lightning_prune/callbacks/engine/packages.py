"""What tells the two packages of Lightning, ``lightning`` and ``pytorch_lightning``, apart; decides nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_utilities.core import rank_zero
from lightning_utilities.core.overrides import is_overridden

__all__ = ["AnyCallback", "AnyEarlyStopping", "AnyModelCheckpoint", "callbacks_named", "is_a", "overrides"]

if TYPE_CHECKING:
    AnyCallback = Callback
    AnyEarlyStopping = EarlyStopping
    AnyModelCheckpoint = ModelCheckpoint
else:
    AnyCallback, AnyEarlyStopping, AnyModelCheckpoint = Callback, EarlyStopping, ModelCheckpoint
    # The other package is the same code under another name, with classes of its own. Its Trainer and its CLI ask for
    # these, whenever it was imported; beside torch and the first package its import costs little. Whatever is wrong
    # with an installation of it, ours does without.
    with suppress(Exception):
        # Each package makes its own logger that of all messages when it is imported: the user's package keeps it.
        logger = rank_zero.log
        try:
            import pytorch_lightning
        finally:
            rank_zero.log = logger

        class AnyCallback(Callback, pytorch_lightning.Callback):
            """Base of the callbacks, so that Trainer and CLI of either package know them."""

        class AnyEarlyStopping(EarlyStopping, pytorch_lightning.Callback):
            """The first package's EarlyStopping, which the other's Trainer knows as a callback."""

        class AnyModelCheckpoint(ModelCheckpoint, pytorch_lightning.callbacks.ModelCheckpoint):
            """The first package's ModelCheckpoint, which the other's Trainer knows as one that saves."""


def is_a(instance: Any, *names: str) -> bool:
    """Return whether an object is of a class of one of these names, whichever package its class is from."""
    return not {kind.__name__ for kind in type(instance).__mro__}.isdisjoint(names)


def callbacks_named(trainer: Trainer, *names: str) -> list[Any]:
    """Return the trainer's callbacks that are of a class of one of these names, whichever package it is from."""
    return [callback for callback in trainer.callbacks if is_a(callback, *names)]  # type: ignore[attr-defined]


def overrides(pl_module: LightningModule, name: str) -> bool:
    """Return whether a module has a method of its own in place of Lightning's, whichever package it derives from."""
    parent = next(kind for kind in type(pl_module).__mro__ if kind.__name__ == "LightningModule")
    return bool(is_overridden(name, pl_module, parent))
