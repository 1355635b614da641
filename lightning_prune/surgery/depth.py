"""Removes layers of a model for good, so that its state dicts say so; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.surgery.recipe import recipe_of
from lightning_prune.surgery.resize import all_or_nothing
from lightning_prune.surgery.skipped import take_out_

__all__ = ["remove_layers_"]


def remove_layers_(model: nn.Module, skips: Mapping[str, dict[str, Any]], optimizers: Iterable[Optimizer] = ()) -> None:
    """Remove layers: their parameters, buffers and what optimizers hold of them. Interrupted, it removes nothing.

    Args:
        model: The model.
        skips: Path of a layer -> what is returned in its place.
        optimizers: The optimizers that train the model.
    """
    optimizers = list(optimizers)
    with all_or_nothing(model, optimizers):
        take_out_(model, skips, optimizers)
        recipe_of(model).needed = True
