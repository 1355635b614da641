"""Loads a checkpoint of a pruned run outside a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_prune.surgery import take_shapes_

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
    with _taking_shapes(module_class):
        return module_class.load_from_checkpoint(checkpoint_path, **kwargs)


@contextmanager
def _taking_shapes(module_class: type[LightningModule]) -> Iterator[None]:
    """Let modules made in the body take the shapes of what they load; a subclass would not be taken for the class."""
    inherited = "load_state_dict" not in vars(module_class)
    load = module_class.load_state_dict

    def resize_and_load(self: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        take_shapes_(self, state_dict, "", getattr(state_dict, "_metadata", {}).get("", {}))
        return load(self, state_dict, *args, **kwargs)

    module_class.load_state_dict = resize_and_load  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if inherited:
            del module_class.load_state_dict
        else:
            module_class.load_state_dict = load  # type: ignore[method-assign]
