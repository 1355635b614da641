"""Makes a model take the shapes of a checkpoint, fatter or slimmer than itself, and says what shapes cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure import named_tensors
from lightning_prune.surgery.attributes import AttributeChange, set_attributes_, shape_attributes
from lightning_prune.surgery.resize import replace_tensors_

__all__ = ["RECIPE", "read_attributes", "resize_"]

RECIPE = "lightning_prune"
"""The key under which a checkpoint carries its recipe."""


def read_attributes(model: nn.Module, places: Iterable[tuple[str, str]]) -> list[list[Any]]:
    """Write down attributes of modules as ``[module path, name, value]``, of plain numbers and lists."""
    values = []
    for path, name in places:
        value = getattr(model.get_submodule(path), name)
        values.append([path, name, list(value) if isinstance(value, tuple) else value])
    return values


def resize_(model: nn.Module, state_dict: Mapping[str, Tensor], attributes: Iterable[list[Any]]) -> None:
    """Give parameters and buffers the shapes they have in a state dict; their values are to be loaded next.

    Parameters stay the same objects. Tensors of another rank, or that one of the two does not have, are left alone.

    Args:
        model: The model to resize.
        state_dict: Tensors by name.
        attributes: What :func:`read_attributes` wrote when the state dict was saved.
    """
    own = named_tensors(model)
    shapes = {
        name: tuple(saved.shape)
        for name, tensor in own.items()
        if (saved := state_dict.get(name)) is not None and saved.dim() == tensor.dim() and saved.shape != tensor.shape
    }
    known = []
    for path, name, value in attributes:
        old = getattr(model.get_submodule(path), name)
        known.append(AttributeChange(path, name, old, tuple(value) if isinstance(value, list) else value))
    set_attributes_(model, shape_attributes(model, shapes, known))
    replace_tensors_(model, {name: torch.zeros(shape).to(own[name]) for name, shape in shapes.items()})
