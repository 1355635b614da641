"""Finds where averaging callbacks keep their copies of the model, and lets the copies follow its shapes."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks.engine.packages import callbacks_named, is_a
from lightning_prune.structure import named_tensors
from lightning_prune.surgery import Cut, cut_, recipe_of, recipes_in, resize_, take_told_
from lightning_prune.surgery.skipped import removed_layers

__all__ = [
    "averaged_copies", "cut_copies_", "keep_metadata_when_saved_", "let_copies_follow", "restart_averages_",
    "with_metadata",
]  # fmt: skip


def averaged_copies(trainer: Trainer) -> list[nn.Module]:
    """Return the copies of the model that other callbacks keep."""
    found: list[nn.Module] = []
    for callback in callbacks_named(trainer, "WeightAveraging", "StochasticWeightAveraging"):
        copy = callback._average_model  # None unless it takes part in a fit
        if copy is not None:
            found.append(copy.module if is_a(callback, "WeightAveraging") else copy)
    return found


def let_copies_follow(trainer: Trainer, pl_module: LightningModule) -> list[RemovableHandle]:
    """Resize the copies to the model's own shapes and numbers when a checkpoint is loaded into them."""
    follow = partial(_take_shapes_of, weakref.ref(pl_module))
    return [copy.register_load_state_dict_pre_hook(follow) for copy in averaged_copies(trainer)]


def keep_metadata_when_saved_(strategy: Strategy) -> None:
    """Have a strategy add the pruning metadata that averaging, or the module's own code, left out of a checkpoint.

    Callbacks and the module's ``on_save_checkpoint`` may replace the state dict, in any order: here all have done so.
    """
    save = strategy.save_checkpoint
    if hasattr(save, "__wrapped__"):  # of an earlier run
        return

    @wraps(save)
    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if strategy.lightning_module is not None:
            _keep_metadata_(strategy.lightning_module, checkpoint)
        save(checkpoint, *args, **kwargs)

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def with_metadata(state_dict: Mapping[str, Any], metadata: Any) -> OrderedDict[str, Any]:
    """Return a copy of a state dict with metadata, which tell what its shapes cannot."""
    copied = OrderedDict(state_dict)
    copied._metadata = metadata  # type: ignore[attr-defined]
    return copied


def cut_copies_(trainer: Trainer, pl_module: LightningModule, cut: Cut) -> None:
    """Make in every copy the cut that is made in the model."""
    for copy in averaged_copies(trainer):
        recipe = recipe_of(copy)
        recipe.note(recipe_of(pl_module).places)
        recipe.needed = True
        cut_(copy, cut, cut.tensors(copy))


def restart_averages_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Start every average anew, with the model as it is."""
    own = named_tensors(pl_module)
    with torch.no_grad():
        for copy in averaged_copies(trainer):
            for name, tensor in named_tensors(copy).items():
                tensor.copy_(own[name])
    for callback in callbacks_named(trainer, "WeightAveraging"):
        if callback._average_model is not None:
            callback._average_model.n_averaged.zero_()


def _keep_metadata_(pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add the pruning metadata that a checkpoint's state dict lacks."""
    if not isinstance(checkpoint.get("state_dict"), Mapping):  # the module's own code took it out
        return
    metadata = getattr(checkpoint.get("current_model_state"), "_metadata", None)
    if metadata is None and not hasattr(checkpoint["state_dict"], "_metadata"):
        metadata = nn.Module.state_dict(pl_module)._metadata  # type: ignore[attr-defined]
    if metadata is not None:
        checkpoint["state_dict"] = with_metadata(checkpoint["state_dict"], metadata)


def _take_shapes_of(
    model: weakref.ref[LightningModule], copy: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any
) -> None:
    """Apply the shapes of a state dict, and the layers and numbers of the model, which has loaded its own before."""
    own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    loaded = model()
    if loaded is None:
        return
    told = recipes_in(nn.Module.state_dict(loaded))
    beside_shapes = any(recipe.keys() & {"layer", "gaps", "experts", "buffers"} for recipe in told.values())
    if beside_shapes or removed_layers(copy):
        take_told_(copy, own, told)
    else:
        resize_(copy, own, recipe_of(loaded).values())
