"""Loads a checkpoint of a pruned run outside a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_prune.surgery import RECIPE, resize_

__all__ = ["load_from_checkpoint"]

_Module = TypeVar("_Module", bound=LightningModule)


def load_from_checkpoint(module_class: type[_Module], checkpoint_path: str | Path, **kwargs: Any) -> _Module:
    """Do what ``module_class.load_from_checkpoint`` does, for a checkpoint whose model was pruned.

    Args:
        module_class: The class that was trained.
        checkpoint_path: A checkpoint, full or of weights alone.
        **kwargs: What ``LightningModule.load_from_checkpoint`` takes: ``map_location``, hyperparameters, ...

    Returns:
        The slim model.
    """

    class Resized(module_class):  # type: ignore[valid-type,misc]
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            recipe = getattr(state_dict, "_metadata", {}).get("", {}).get(RECIPE)
            if recipe is not None:
                resize_(self, state_dict, recipe["attributes"])
            return super().load_state_dict(state_dict, *args, **kwargs)

    Resized.__name__, Resized.__qualname__ = module_class.__name__, module_class.__qualname__
    module = Resized.load_from_checkpoint(checkpoint_path, **kwargs)
    module.__class__ = module_class
    return module  # type: ignore[no-any-return]
