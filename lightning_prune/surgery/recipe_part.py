"""The part of a recipe that one module carries: numbers that follow a cut, and masks of its own parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.model.bits import pack_bits, unpack_bits
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import own_part, part_like
from lightning_prune.surgery.attributes import constructor_numbers, held_number
from lightning_prune.surgery.layer_lists import ClosedList
from lightning_prune.surgery.pass_through import Skipped, check_skip
from lightning_prune.surgery.resize import narrowed

__all__ = [
    "RECIPE", "PackedMasks", "RecipePart", "Told", "are_whole", "checked", "fits", "follow_experts_", "followed_mask",
    "is_whole", "joined", "keep_experts_", "note_buffer_", "part_of", "recipes_in", "refuse_hollow", "take_buffers_",
]  # fmt: skip

RECIPE = "lightning_prune"
"""The key under which the metadata of a module in a state dict carries its part of the recipe."""

_VERSION = 1
_AT_ONCE = 2**20  # entries of a weight that are compared with its mask together

PackedMasks = dict[str, list[Any]]
"""Name of a parameter -> its mask, as ``[packed bits, shape]`` (see :mod:`lightning_prune.model.bits`)."""

Told = dict[str, dict[str, Any]]
"""Path of a module -> its part of the recipe: ``version``, ``attributes`` by name, ``masks`` by name.

Where a layer was removed there is also ``layer``: what is returned in its place. Where layers were taken out of a list
there is also ``gaps``: pairs of a position in it and what is returned in its place. Where experts were removed from a
container there is also ``experts``: how many it holds. Where buffers were cut that state dicts do not have there is
also ``buffers``: the name of one, a dimension, its size before the first cut, and the indices kept. Where the module
holds hyperparameters that cuts change there is also ``built_with``: what its constructor was called with, by name."""


@dataclass(eq=False)
class RecipePart:
    """A hook that a module carries: writes its part of the recipe into the metadata of its state dicts.

    Attributes:
        attributes: Names of the numbers to write; they may lead through a config.
        masks: The masks of the module's own parameters.
        needed: Whether the model was pruned, so that the hook stays after a run.
        experts: Whether experts were removed from the module, a container.
        buffers: Buffers that state dicts do not have, and that were cut, as they were before the first cut.
        left: What is left of these: name -> dimension -> indices kept.
    """

    attributes: list[str] = field(default_factory=list)
    masks: PackedMasks = field(default_factory=dict)
    needed: bool = False
    experts: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, dict[int, list[int]]] = field(default_factory=dict)

    def __call__(self, module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
        """Write plain numbers, lists and tensors, and never fail: state dicts are saved by code that is not ours."""
        masks = {leaf: m for leaf, m in self.masks.items() if _holds(m, state_dict.get(prefix + leaf))}
        local_metadata[RECIPE] = {"version": _VERSION, "attributes": self.values(module), "masks": masks}
        if isinstance(module, Skipped):
            local_metadata[RECIPE]["layer"] = copy.deepcopy(module.skip)
        if isinstance(module, ClosedList) and module.gone:
            local_metadata[RECIPE]["gaps"] = [[position, copy.deepcopy(skip)] for position, skip in module.gone.items()]
        if self.experts:
            local_metadata[RECIPE]["experts"] = len(module._modules)
        if self.left:
            local_metadata[RECIPE]["buffers"] = self.buffers_left()
        if built_with := constructor_numbers(module, self.attributes):
            local_metadata[RECIPE]["built_with"] = built_with

    def values(self, module: nn.Module) -> dict[str, Any]:
        """Return the numbers that are still there, by name."""
        held = {name: _plain(held_number(module, name)) for name in self.attributes}
        return {name: value for name, value in held.items() if is_whole(value) or are_whole(value)}

    def buffers_left(self) -> list[list[Any]]:
        """Return the name, a dimension, its first size and the indices kept, of each buffer that state dicts lack."""
        return [
            [leaf, dim, self.buffers[leaf].shape[dim], list(kept)]
            for leaf, dims in self.left.items()
            for dim, kept in dims.items()
        ]

    def masks_on(self, module: nn.Module) -> PackedMasks:
        """Return the masks that still hold. Weights that were written to since have ended theirs."""
        own = module._parameters
        return {leaf: m for leaf, m in self.masks.items() if own.get(leaf) is not None and _holds(m, own[leaf])}


def note_buffer_(part: RecipePart, leaf: str, buffer: Tensor, kept: Mapping[int, Tensor]) -> None:
    """Note what a cut leaves of a buffer that state dicts do not have, before it is cut."""
    left = dict(part.left.get(leaf, {}))
    for dim, indices in kept.items():
        before = left.get(dim, range(buffer.shape[dim]))
        left[dim] = [before[index] for index in indices.tolist()]
    part.left = part.left | {leaf: left}
    part.buffers = {leaf: buffer} | part.buffers  # the first one stays


def take_buffers_(module: nn.Module, told: Iterable[Any]) -> None:
    """Cut the buffers that state dicts do not have as they were in another model, or give back what was cut of them.

    Those of other sizes than in that model's constructor are left alone.
    """
    part = part_of(module)
    if part is None:
        return
    wanted: dict[str, dict[int, list[int]]] = {leaf: {} for leaf in part.left}
    for leaf, dim, size, kept in told:
        own = part.buffers.get(leaf, module._buffers.get(leaf))
        if own is not None and leaf in module._non_persistent_buffers_set and own.shape[dim : dim + 1] == (size,):
            wanted.setdefault(leaf, {})[dim] = list(kept)
    for leaf, left in wanted.items():
        if left != part.left.get(leaf, {}):
            own = module._buffers[leaf]
            assert own is not None
            dense = part.buffers.get(leaf, own)
            indices = {dim: torch.tensor(kept, dtype=torch.int64) for dim, kept in left.items()}
            module._buffers[leaf] = narrowed(dense, indices).to(own)
            part.left = {name: dims for name, dims in (part.left | {leaf: left}).items() if dims}
            part.buffers = {leaf: dense} | part.buffers


def part_of(module: nn.Module) -> RecipePart | None:
    """Return the part of a recipe that a module carries."""
    for hook in module._state_dict_hooks.values():  # most often there is none, or ours alone
        if isinstance(hook, RecipePart):
            return hook
    return None


def recipes_in(state_dict: Any) -> Told:
    """Return what the metadata of a state dict tells, by module path.

    Raises:
        PruningError: If it is not what this version writes.
    """
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(of, Mapping) for of in metadata.values()):
        raise PruningError("The metadata of the state dict cannot be read: the file is damaged. Load an earlier one.")
    return checked({path: of[RECIPE] for path, of in metadata.items() if RECIPE in of})


def checked(told: Told) -> Told:
    """Return parts of a recipe, once it is known that they are what this version writes.

    Raises:
        PruningError: If they are something else.
    """
    for path, recipe in told.items():
        _refuse_unreadable(path, recipe)
    return told


def _refuse_unreadable(path: Any, recipe: Any) -> None:
    """Refuse a part of a recipe that this version did not write, before anything is made of it."""
    try:
        if recipe["version"] != _VERSION:
            raise ValueError(f"version {recipe['version']!r} instead of {_VERSION}")
        for name, value in recipe["attributes"].items():
            if not isinstance(name, str) or not (is_whole(value) or are_whole(value)):
                raise TypeError(f"{name!r}: {value!r}")
        if "layer" in recipe:
            check_skip(recipe["layer"])
        for position, skip in recipe.get("gaps", []):
            if not is_whole(position) or position < 0:
                raise TypeError(f"{position!r} is no position")
            check_skip(skip)
        if not is_whole(recipe.get("experts", 1)) or recipe.get("experts", 1) < 1:
            raise TypeError(f"{recipe['experts']!r} experts")
        for leaf, dim, size, kept in recipe.get("buffers", []):
            possible = isinstance(leaf, str) and are_whole([dim, size, *kept]) and dim >= 0 and len(kept) > 0
            if not possible or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < size:
                raise TypeError(f"{leaf!r}: {kept!r} of {size!r}")
        for name, value in recipe.get("built_with", {}).items():
            if not isinstance(name, str) or not (is_whole(value) or are_whole(value)):
                raise TypeError(f"{name!r}: {value!r}")
        for name, (packed, shape) in recipe["masks"].items():
            if not isinstance(name, str) or not are_whole(shape) or min(shape, default=0) < 0:
                raise TypeError(f"{name!r}: {shape!r}")
            refuse_hollow(name, packed)
            if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != -(-math.prod(shape) // 8):
                raise ValueError(f"{name!r}: {len(packed)} bytes for shape {shape!r}")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise PruningError(
            f"The pruning metadata in the state dict of {path or 'the model'} cannot be read ({error!r}): the file is "
            "damaged, or another version of lightning_prune wrote it. Load an earlier checkpoint."
        ) from error


def refuse_hollow(name: str, saved: Tensor) -> None:
    """Refuse a tensor that claims more entries than its file holds: a small file must not ask for large memory."""
    if saved.layout != torch.strided:
        return
    if saved.is_meta or saved.numel() * saved.element_size() > saved.untyped_storage().nbytes():
        raise PruningError(
            f"{name} is of shape {tuple(saved.shape)} in the state dict, which holds fewer entries: the file is "
            "damaged. Load an earlier checkpoint."
        )


def keep_experts_(container: nn.Module, kept: Iterable[int]) -> None:
    """Keep the experts with these numbers, in this order, under the first names of their container."""
    names, children = list(container._modules), list(container._modules.values())
    container._modules.clear()
    container._modules.update(zip(names, [children[number] for number in kept], strict=False))
    if (part := part_of(container)) is not None:
        part.experts = True


def follow_experts_(model: nn.Module, names: Collection[str], told: Told) -> bool:
    """Make containers of experts as long as in a state dict with these names; return whether there are any to follow.

    That is those of which ``told`` speaks, and those that lost experts here: they may have had more when it was saved.
    """
    changed, modules = False, dict(model.named_modules(remove_duplicate=False))
    pruned = [path for path, module in modules.items() if (part := part_of(module)) is not None and part.experts]
    for path in dict.fromkeys([*(path for path, recipe in told.items() if "experts" in recipe), *pruned]):
        if not isinstance(modules.get(path), nn.ModuleList | nn.ModuleDict):
            continue
        prefix, children = joined(path, ""), modules[path]._modules
        there = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
        count = told.get(path, {}).get("experts", len(there))
        if len(there) == count and children and there:  # else loading says what is missing
            changed |= count != len(children)
            for name in sorted(there - children.keys(), key=lambda name: (len(name), name)):
                children[name] = copy.deepcopy(next(reversed(children.values())))
            keep_experts_(modules[path], range(count))
    return changed or any("experts" in recipe for recipe in told.values())


def joined(path: str, leaf: str) -> str:
    """Return the whole name of what a module holds."""
    return f"{path}.{leaf}" if path else leaf


def _plain(value: Any) -> Any:
    """Return a value in types that every reader of checkpoints takes."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, np.integer) else value


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number; truth values are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def are_whole(values: Any) -> bool:
    """Return whether a value is several whole numbers."""
    return isinstance(values, list | tuple) and all(is_whole(value) for value in values)


def fits(shape: Iterable[int], whole: Iterable[int]) -> bool:
    """Return whether a mask of a shape spreads to a whole tensor's."""
    shape, whole = list(shape), list(whole)
    return len(shape) == len(whole) and all(size in (1, other) for size, other in zip(shape, whole, strict=True))


def followed_mask(mask: list[Any], dims: Mapping[int, Tensor]) -> list[Any]:
    """Return a packed mask narrowed along the dimensions in which it is not one for all."""
    keep = unpack_bits(*mask)
    slim = narrowed(keep, {dim: index for dim, index in dims.items() if keep.shape[dim] > 1})
    return [pack_bits(slim), list(slim.shape)]


def _holds(mask: list[Any], weight: Any) -> bool:
    """Return whether a weight is zero wherever a mask says so; one that is not there cannot say otherwise."""
    packed, shape = mask
    if not isinstance(weight, Tensor) or weight.is_meta:
        return True
    if not fits(shape, weight.shape):
        return False
    try:
        keep = part_like(unpack_bits(packed, shape), weight)
        dense = torch.atleast_1d(_dense(own_part(weight)))
        keep = keep.to(dense.device).expand(dense.shape)
        # a part at a time: a copy of a large weight is as large as the weight
        rows = max(1, _AT_ONCE // max(1, math.prod(dense.shape[1:])))
        parts = zip(dense.split(rows), keep.split(rows), strict=True)
        return not any(part.masked_fill(stays, 0).any() for part, stays in parts)
    except (NotImplementedError, RuntimeError, TypeError):  # of a kind that does not say what it holds
        return False


def _dense(weight: Tensor) -> Tensor:
    """Return a weight in a form that can be compared with zero: quantized, sparse and tiny floats cannot."""
    weight = weight.detach()
    if weight.is_quantized:
        return weight.dequantize()
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        weight = weight.to_dense()
    return weight.float() if weight.is_floating_point() and weight.element_size() == 1 else weight
