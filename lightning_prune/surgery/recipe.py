"""Makes a model take the shapes of a checkpoint, fatter or slimmer than itself, and says what shapes cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.model.bits import unpack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.attributes import ABSENT, AttributeChange, held_number, set_attributes_, shape_attributes
from lightning_prune.surgery.resize import replace_tensors_

__all__ = ["RECIPE", "PackedMasks", "Recipe", "drop_unused_recipe_", "recipe_of", "resize_", "take_shapes_"]

RECIPE = "lightning_prune"
"""The key under which the metadata of a state dict carries its recipe."""

_PLAIN = (int, float, list, type(None))
"""What the value of an attribute may be in a recipe."""

PackedMasks = dict[str, list[Any]]
"""Name of a parameter -> what of it stays, as ``[packed bits, shape]`` (see :mod:`lightning_prune.model.bits`)."""


@dataclass(eq=False)
class Recipe:
    """A hook that a model carries: writes into its state dicts what the shapes of their tensors cannot tell.

    It stays on a model that was cut, whose checkpoints could not be loaded otherwise, whoever saves them and when.

    Attributes:
        places: Attributes of modules to write, as ``(module path, name)``.
        masks: Which weights are zero for good. They are written as long as it is true: who trains without what holds
            them loses them.
        needed: Whether the model's shapes may differ from those that its constructor gave, or masks lie on it.
    """

    places: list[tuple[str, str]] = field(default_factory=list)
    masks: PackedMasks = field(default_factory=dict)
    needed: bool = False

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        """Write the values of the attributes and the masks, as plain numbers, lists and tensors."""
        masks = {name: mask for name, mask in self.masks.items() if _holds(mask, state_dict.get(prefix + name))}
        local_metadata[RECIPE] = {"attributes": self.values(module), "masks": masks}

    def values(self, module: nn.Module) -> list[list[Any]]:
        """Return ``[module path, name, value]`` of every attribute that is still there."""
        modules = dict(module.named_modules(remove_duplicate=False))
        values = []
        for path, name in self.places:
            value = held_number(modules.get(path), name)
            if value is not ABSENT:
                values.append([path, name, _plain(value)])
        return values

    def note(self, places: Iterable[tuple[str, str]]) -> None:
        """Add attributes that are to be written."""
        self.places = list(dict.fromkeys([*self.places, *places]))


def _plain(value: Any) -> Any:
    """Return a value in types that every reader of checkpoints takes."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, np.integer) else value


def recipe_of(model: nn.Module) -> Recipe:
    """Return the recipe that a model carries, a new one if it carries none."""
    found = next((hook for hook in model._state_dict_hooks.values() if isinstance(hook, Recipe)), None)
    if found is None:
        found = Recipe()
        model.register_state_dict_post_hook(found)
    return found


def drop_unused_recipe_(model: nn.Module) -> None:
    """Take the recipe off a model that was never cut."""
    for key, hook in list(model._state_dict_hooks.items()):
        if isinstance(hook, Recipe) and not hook.needed:
            del model._state_dict_hooks[key]


def take_shapes_(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Take the shapes of a state dict that is about to be loaded, if a recipe lies beside it; a hook before loading.

    Where the state dict has a part of a module's tensors alone, the model stays as it is, and loading says why.

    Raises:
        PruningError: If the recipe cannot be read. The model stays as it is.
    """
    recipe = local_metadata.get(RECIPE)
    if recipe is not None:
        _refuse_unreadable(module, recipe)
    if recipe is not None and _tells_all(module, state_dict, prefix):
        own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        resize_(module, own, recipe["attributes"])
        recipe_of(module).masks = dict(recipe.get("masks", {}))


def resize_(model: nn.Module, state_dict: Mapping[str, Tensor], attributes: Iterable[list[Any]]) -> None:
    """Give parameters and buffers the shapes they have in a state dict; their values are to be loaded next.

    Parameters stay the same objects. Tensors of another rank, or that one of the two does not have, are left alone.

    Args:
        model: The model to resize.
        state_dict: Tensors by name.
        attributes: What the :class:`Recipe` wrote when the state dict was saved. Modules that the model does not have
            are passed over: loading says what is missing.
    """
    own = named_tensors(model)
    shapes = {
        name: tuple(saved.shape)
        for name, tensor in own.items()
        if (saved := state_dict.get(name)) is not None and saved.dim() == tensor.dim() and saved.shape != tensor.shape
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    known = []
    for path, name, value in attributes:
        old = held_number(modules.get(path), name)
        if old is not ABSENT:
            known.append(AttributeChange(path, name, old, tuple(value) if isinstance(old, tuple) else value))
    set_attributes_(model, shape_attributes(model, shapes, known))
    replace_tensors_(model, {name: torch.zeros(shape).to(own[name]) for name, shape in shapes.items()})
    recipe = recipe_of(model)
    recipe.note((change.module, change.name) for change in known)
    recipe.needed = True


def _refuse_unreadable(module: nn.Module, recipe: Any) -> None:
    try:
        for path, name, value in recipe["attributes"]:
            if not (isinstance(path, str) and isinstance(name, str) and isinstance(value, _PLAIN)):
                raise TypeError(f"{path!r}, {name!r}, {value!r}")
        for packed, shape in recipe.get("masks", {}).values():
            unpack_bits(packed, shape)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PruningError(
            f"What stands beside the weights of {type(module).__name__} in the state dict cannot be read ({error!r}): "
            "the file is damaged, or another version of lightning_prune wrote it. Load an earlier checkpoint."
        ) from error


def _tells_all(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Tell whether a state dict has all tensors of each module that it has any of, with as many dimensions."""
    told: dict[str, set[bool]] = {}
    for name, tensor in nn.Module.state_dict(module, keep_vars=True).items():
        saved = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor):
            told.setdefault(name.rpartition(".")[0], set()).add(saved is not None)
        fits = isinstance(saved, Tensor) and isinstance(tensor, Tensor) and saved.dim() == tensor.dim()
        if isinstance(tensor, Tensor) and saved is not None and not fits:
            return False
    return all(len(found) == 1 for found in told.values())


def _holds(mask: list[Any], weight: Tensor | None) -> bool:
    """Tell whether a weight is zero wherever a mask says so; one that is not saved cannot say otherwise."""
    packed, shape = mask
    if weight is None:
        return True
    if len(shape) != weight.dim() or any(size not in (1, own) for size, own in zip(shape, weight.shape, strict=True)):
        return False
    return not weight.detach().masked_fill(unpack_bits(packed, shape).to(weight.device), 0).any()
