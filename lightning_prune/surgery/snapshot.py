"""Remembers a model and its optimizers as they stand, and brings them back after later cuts; decides nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_prune.model.calls import modules_of
from lightning_prune.model.shards import is_sharded, split_like
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.recipe import recipe_of, resize_
from lightning_prune.surgery.recipe_part import follow_experts_, take_buffers_
from lightning_prune.surgery.resize import with_wrapped
from lightning_prune.surgery.skipped import follow_layers_, groups_of, removed_layers, set_groups_

__all__ = ["restore_", "take_snapshot"]


def take_snapshot(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
    """Copy every parameter, buffer and optimizer state, and what shapes cannot tell, as plain dicts and tensors."""
    optimizers = with_wrapped(optimizers)
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()},
        "attributes": recipe_of(model).values(),
        "buffers": recipe_of(model).buffers,
        "layers": copy.deepcopy(removed_layers(model)),
        "groups": [groups_of(model, optimizer) for optimizer in optimizers],
        "optimizers": [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers],
    }


def restore_(model: nn.Module, optimizers: Iterable[Optimizer], snapshot: dict[str, Any]) -> None:
    """Restore the shapes and values of a snapshot in the model and its optimizers; learning rates stay as they are.

    Parameters stay the same objects; their gradients are dropped.
    """
    optimizers = with_wrapped(optimizers)
    brought_back = follow_layers_(model, snapshot["tensors"], snapshot["layers"])
    brought_back |= follow_experts_(model, snapshot["tensors"], {})
    for path, module in modules_of(model):
        take_buffers_(module, snapshot["buffers"].get(path, ()))
    resize_(model, snapshot["tensors"], snapshot["attributes"])
    for optimizer, groups in zip(optimizers, snapshot["groups"], strict=True) if brought_back else ():
        set_groups_(model, optimizer, groups)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(split_like(snapshot["tensors"][name], tensor))
            tensor.grad = None
    for optimizer, state in zip(optimizers, snapshot["optimizers"], strict=True):
        own = _split_state(optimizer, copy.deepcopy(state))
        held, groups = optimizer.state, optimizer.param_groups  # an optimizer around this one may hold them, too
        optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})
        loaded = dict(optimizer.state)
        held.clear()
        held.update(loaded)
        optimizer.state, optimizer.param_groups = held, groups


def _split_state(optimizer: Optimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """Split state that is whole, as from a checkpoint, where its parameter is split over processes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(parameters):
        if place in state and is_sharded(parameter):
            state[place] = tree_map_only(Tensor, partial(split_like, tensor=parameter), state[place])
    return state
