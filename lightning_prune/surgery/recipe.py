"""Makes a model take the shapes of a state dict, fatter or slimmer than itself, and saves what shapes cannot tell.

Each module carries what concerns itself (:mod:`lightning_prune.surgery.recipe_part`). So a part of a model tells of
itself, wherever it was pruned and into whatever it was put.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Container, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import is_tensor_like

from lightning_prune.model.calls import modules_of
from lightning_prune.model.errors import PruningError
from lightning_prune.structure import named_tensors
from lightning_prune.surgery.attributes import (
    ABSENT,
    HYPERPARAMETERS,
    AttributeChange,
    constructor_numbers,
    follows_cuts,
    held_number,
    set_attributes_,
    shape_attributes,
)
from lightning_prune.surgery.configs import follow_configs
from lightning_prune.surgery.layer_lists import (
    ClosedList,
    Gaps,
    close_lists_,
    follow_depth,
    moved_back,
    open_lists_,
)
from lightning_prune.surgery.recipe_part import (
    RECIPE,
    PackedMasks,
    RecipePart,
    Told,
    checked,
    fits,
    follow_experts_,
    followed_mask,
    is_whole,
    joined,
    note_buffer_,
    part_of,
    recipes_in,
    refuse_hollow,
    take_buffers_,
)
from lightning_prune.surgery.resize import Kept, all_or_nothing, replace_tensors_
from lightning_prune.surgery.skipped import bring_back_, follow_layers_, has_all_layers, removed_layers
from lightning_prune.surgery.timm_numbers import follow_timm

__all__ = [
    "Recipe", "drop_unused_recipe_", "recipe_of", "refuse_other_shapes", "refuse_unloadable", "resize_",
    "take_shapes_", "take_told_", "take_untold_",
]  # fmt: skip


class Recipe:
    """What a model's state dicts tell of its pruning, read from and written to the parts that its modules carry."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts = {path: part for path, module in modules_of(model) if (part := part_of(module)) is not None}

    @property
    def places(self) -> list[tuple[str, str]]:
        """The attributes to write, as ``(module path, name)``."""
        return [(path, name) for path, part in self._parts.items() for name in part.attributes]

    def note(self, places: Iterable[tuple[str, str]]) -> None:
        """Add attributes to write, as ``(module path, name)``."""
        for path, name in places:
            part = self._parts.get(path) or part_of(self._model.get_submodule(path))  # a path may be another name
            if part is not None and name not in part.attributes:
                part.attributes = [*part.attributes, name]

    def values(self) -> list[list[Any]]:
        """Return ``[module path, name, value]`` of every attribute that is still there."""
        modules = dict(modules_of(self._model))
        return [
            [path, name, value]
            for path, part in self._parts.items()
            for name, value in part.values(modules[path]).items()
        ]

    @property
    def needed(self) -> bool:
        """Whether the model's shapes may differ from those that its constructor gave, or masks lie on it."""
        return any(part.needed for part in self._parts.values())

    @needed.setter
    def needed(self, needed: bool) -> None:
        for part in self._parts.values():
            part.needed = needed

    @property
    def masks(self) -> PackedMasks:
        """The masks that hold, under the first name of each parameter."""
        found: PackedMasks = {}
        if not any(part.masks for part in self._parts.values()):
            return found
        names: dict[int, str] = {}
        for path, module in modules_of(self._model):
            for leaf, parameter in module._parameters.items():
                names.setdefault(id(parameter), joined(path, leaf))
            for leaf, mask in self._parts[path].masks_on(module).items() if path in self._parts else ():
                found.setdefault(names[id(module._parameters[leaf])], mask)
        return found

    def write_masks_(self, masks: PackedMasks, lifted: Iterable[str] = ()) -> None:
        """Set masks of parameters and lift others, by name; a shared parameter has its mask wherever it lies."""
        lifted = list(lifted)
        if not masks and not lifted:
            return
        own = dict(self._model.named_parameters())
        new = {id(own[name]): mask for name, mask in masks.items()}
        gone = {id(own[name]) for name in lifted if name in own}
        for path, module in modules_of(self._model):
            if (part := self._parts.get(path)) is None:
                continue
            leaves = {leaf: id(p) for leaf, p in module._parameters.items() if p is not None}
            others = {leaf: mask for leaf, mask in part.masks.items() if leaves.get(leaf) not in gone}
            part.masks = others | {leaf: new[key] for leaf, key in leaves.items() if key in new}
            part.needed = part.needed or bool(masks)

    def followed(self, kept: Kept) -> PackedMasks:
        """Return what the masks become after a cut that removes entries of the parameters themselves."""
        masks = {name: mask for name, mask in self.masks.items() if name in kept}
        return {name: followed_mask(mask, kept[name]) for name, mask in masks.items()}

    def note_buffers_(self, kept: Kept) -> None:
        """Note what a cut leaves of buffers that state dicts do not have, before they are cut."""
        firsts = {id(tensor): name for name, tensor in named_tensors(self._model).items()}
        for path, module in modules_of(self._model):
            if (part := self._parts.get(path)) is None:
                continue
            for leaf in module._non_persistent_buffers_set:
                buffer = module._buffers.get(leaf)
                if buffer is not None and (dims := kept.get(firsts[id(buffer)])):
                    note_buffer_(part, leaf, buffer, dims)

    @property
    def buffers(self) -> dict[str, list[Any]]:
        """What is left of buffers that state dicts do not have, by module path, as a recipe tells it."""
        return {path: part.buffers_left() for path, part in self._parts.items() if part.left}


def recipe_of(model: nn.Module) -> Recipe:
    """Return the recipe that a model carries, an empty one if it carries none."""
    for _, module in modules_of(model):
        if part_of(module) is None and not isinstance(module, torch.jit.ScriptModule):
            module.register_load_state_dict_pre_hook(take_shapes_)
            module.register_state_dict_post_hook(RecipePart())
    return Recipe(model)


def drop_unused_recipe_(model: nn.Module) -> None:
    """Remove the recipe from the modules of a model that was never pruned."""
    for _, module in modules_of(model):
        part = part_of(module)
        if part is None or part.needed:
            continue
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if hook is part or getattr(hook, "hook", hook) is take_shapes_:
                    del hooks[key]


def take_shapes_(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Apply the shapes and masks that a state dict records, before it is loaded; a pre-hook of ``load_state_dict``.

    One that records nothing is refused if its shapes are others.

    Where the state dict has a part of a module's tensors alone, the model stays as it is, and loading says why.

    Raises:
        PruningError: If what it tells cannot be, or is not for this model. The model stays as it is.
    """
    if hasattr(state_dict, "_metadata"):  # of a whole model; torch does not hand it on to its parts
        told = {
            whole.removeprefix(prefix).removesuffix("."): of
            for path, of in recipes_in(state_dict).items()
            if (whole := f"{path}." if path else "").startswith(prefix)
        }
    elif isinstance(local_metadata, Mapping) and RECIPE in local_metadata:
        told = checked({"": local_metadata[RECIPE]})
    else:
        told = {}
    if not told and prefix:
        return
    own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if told:
        take_told_(module, own, told)
    else:
        take_untold_(f"{type(module).__name__}.load_state_dict", module, own)


def take_untold_(where: str, module: nn.Module, state_dict: Mapping[str, Any]) -> set[str]:
    """Bring removed layers back for a state dict that has all of them, and tells nothing of pruning.

    Returns:
        The names of the tensors made anew.

    Raises:
        PruningError: If its shapes are others, and nothing but pruning could make them fit. The model stays as it is.
    """
    closed = _closed_within(module, state_dict, {})
    with all_or_nothing(module) if closed or removed_layers(module) else nullcontext():
        before = named_tensors(module).keys()
        with suppress(_LayersMissingError), all_or_nothing(module) if closed else nullcontext():
            open_lists_(module, closed)
            if has_all_layers(module, state_dict):
                bring_back_(module, removed_layers(module))
            elif closed:
                raise _LayersMissingError  # so that the lists are closed again
        refuse_other_shapes(where, module, state_dict)
        return named_tensors(module).keys() - before


class _LayersMissingError(Exception):
    """A state dict has some of the layers that were removed, and not all."""


def _closed_within(module: nn.Module, state_dict: Mapping[str, Any], told: Container[str]) -> list[str]:
    """Return the paths of lists from which layers were taken out that a state dict has, or tells of."""
    found = []
    for path, own in modules_of(module):
        if isinstance(own, ClosedList):
            beyond = f"{path}.{len(own._modules)}." if path else f"{len(own._modules)}."
            if path in told or any(name.startswith(beyond) for name in state_dict):
                found.append(path)
    return found


def refuse_other_shapes(where: str, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that tells nothing of pruning and has other shapes than a model.

    Shapes that other code changes while it loads are left to it.

    Raises:
        PruningError: Naming the first tensor, and saying what to do.
    """
    for name, tensor in named_tensors(model).items():
        saved = state_dict.get(name)
        if not isinstance(saved, Tensor) or is_lazy(tensor) or saved.shape == tensor.shape:
            continue
        from_old_torch = tensor.dim() == 0 and tuple(saved.shape) == (1,)  # which torch takes
        if from_old_torch or _changed_by_others(model, name.rpartition(".")[0]):
            continue
        kind = type(model).__name__
        dense = ""
        if any(part.needed for _, module in modules_of(model) if (part := part_of(module)) is not None):
            dense = f" If it is of {kind} as it was before pruning, build a {kind} anew and load it there."
        raise PruningError(
            f"{where}: size mismatch for {name}: {tuple(saved.shape)} in the state dict and {tuple(tensor.shape)} in "
            f"{kind}, and the state dict has no pruning metadata: another model was saved, or a copy into a plain "
            f"dict, a file of safetensors or a load_state_dict of one's own lost it.{dense} If it is of a pruned "
            f"{kind}, save model.state_dict() as it is by torch.save and load it by load_state_dict_, use save_sparse "
            "and load_sparse_, or keep recipe_json(model) and pass it as recipe= to load_state_dict_ or slim_loading."
        )


def _changed_by_others(model: nn.Module, path: str) -> bool:
    """Return whether code that is not ours may give a module's tensors other shapes while they are loaded."""
    chain = [model]
    for name in path.split(".") if path else ():
        chain.append(chain[-1].get_submodule(name))
    for module in chain:
        hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
        loader = type(module)._load_from_state_dict.__module__
        if any(hook is not take_shapes_ for hook in hooks) or not loader.startswith("torch.nn"):
            return True
    return False


def take_told_(module: nn.Module, state_dict: Mapping[str, Any], told: Told) -> set[str]:
    """Apply the layers, shapes, numbers and masks that parts of a recipe record.

    Returns:
        The names of the tensors made anew.

    Raises:
        PruningError: If they are not for this model. The model stays as it is.
    """
    skips = {path: recipe["layer"] for path, recipe in told.items() if "layer" in recipe}
    closed = {path for path, own in modules_of(module) if isinstance(own, ClosedList)}
    gaps = {path: dict(recipe["gaps"]) for path, recipe in told.items() if "gaps" in recipe}
    recipe_of(module)  # its state is restored, too
    with all_or_nothing(module):
        before = named_tensors(module).keys()
        if _follow_depth(module, state_dict, told, skips, gaps, closed) | follow_experts_(module, state_dict, told):
            recipe_of(module).needed = True
        return _take_shapes(module, state_dict, told) | (named_tensors(module).keys() - before)


def _follow_depth(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    told: Told,
    skips: Mapping[str, dict[str, Any]],
    gaps: Mapping[str, dict[int, dict[str, Any]]],
    closed: Collection[str],
) -> bool:
    """Make a model have the layers that a state dict has, in lists from which as many were taken out.

    Returns:
        Whether anything changed.
    """
    same = {path for path in closed if path in gaps and module.get_submodule(path).gone == gaps[path]}
    others = {path: gone for path, gone in gaps.items() if path not in same}
    opened = [path for path in _closed_within(module, state_dict, told) if path not in same]
    if not others and not opened:
        return follow_layers_(module, state_dict, skips)
    open_lists_(module, opened)
    whole = {moved_back(path, others): skip for path, skip in skips.items()}
    taken: Gaps = {}
    for path, gone in others.items():
        at = moved_back(path, others)
        taken[at] = tuple(sorted(gone))
        whole |= {f"{at}.{position}": skip for position, skip in gone.items()}
    follow_layers_(module, [moved_back(name, others) for name in state_dict], whole)
    there = removed_layers(module).keys()
    taken = {path: gone for path, gone in taken.items() if all(f"{path}.{position}" in there for position in gone)}
    close_lists_(module, taken, [change for change in follow_depth(module).changes if taken])
    return True


def _take_shapes(module: nn.Module, state_dict: Mapping[str, Any], told: Told) -> set[str]:
    modules = dict(module.named_modules(remove_duplicate=False))
    told = {path: recipe for path, recipe in told.items() if path in modules}
    names = _names_of(module)
    refuse_unloadable(state_dict, names)
    if not all(_tells_all(path, modules[path], state_dict, names) for path in told):
        return set()
    tensors = {
        name: saved
        for path in told
        for leaf in (*modules[path]._parameters, *modules[path]._buffers)
        if isinstance(saved := state_dict.get(name := joined(path, leaf)), Tensor)
    }
    masks = {path: _fitting_masks(path, modules[path], state_dict, recipe["masks"]) for path, recipe in told.items()}
    attributes = [[path, name, value] for path, of in told.items() for name, value in of["attributes"].items()]
    for path, recipe in told.items():
        _warn_of_other_numbers(modules[path], recipe.get("built_with", {}))
    with all_or_nothing(module):
        changed = resize_(module, tensors, attributes)
        for path, own in masks.items():
            if (part := part_of(modules[path])) is not None:
                part.masks = own
            take_buffers_(modules[path], told[path].get("buffers", []))
    return changed


def _warn_of_other_numbers(module: nn.Module, built_with: Mapping[str, Any]) -> None:
    """Warn if a module was built with other numbers than the one that was saved, which may change more than widths."""
    own = constructor_numbers(module, [f"{HYPERPARAMETERS}.{name}" for name in built_with])
    others = [
        f"{name}={own[name]!r} instead of {value!r}"
        for name, value in built_with.items()
        if own.get(name, value) != value
    ]
    if others:
        warnings.warn(
            f"{type(module).__name__} was built with {', '.join(others)}, so what its constructor makes of that "
            "besides widths may differ. Load it by lightning_prune.load_from_checkpoint, or build it as it was.",
            stacklevel=2,
        )


def resize_(model: nn.Module, state_dict: Mapping[str, Tensor], attributes: Iterable[list[Any]]) -> set[str]:
    """Resize parameters and buffers to the shapes of a state dict; their values are to be loaded next.

    Until then they keep the entries that both shapes have.

    Parameters stay the same objects. Tensors of another rank, or that one of the two does not have, are left alone.

    Args:
        model: The model to resize.
        state_dict: Tensors by name.
        attributes: ``[module path, name, value]`` as :meth:`Recipe.values` gave when the state dict was saved. What
            the model does not have is passed over: loading says what is missing.

    Returns:
        The first names of the tensors that were resized.

    Raises:
        PruningError: If an attribute is none that a cut may change, or a size is none. The model stays as it is.
    """
    own, names = named_tensors(model), _names_of(model)
    shapes = {}
    for name, saved in state_dict.items():
        first = names.get(name)
        if first is None or saved.dim() != own[first].dim() or saved.shape == own[first].shape:
            continue
        refuse_hollow(name, saved)
        shapes[first] = tuple(saved.shape)
    largest = max((tensor.numel() for tensor in state_dict.values() if isinstance(tensor, Tensor)), default=0)
    modules = dict(model.named_modules(remove_duplicate=False))
    known = [
        AttributeChange(path, name, old, _alike(old, value))
        for path, name, value in attributes
        if path in modules and (old := held_number(modules[path], name)) is not ABSENT
    ]
    for change in known:
        _refuse_impossible(modules[change.module], change, largest)
    changes = shape_attributes(model, shapes, known)
    told = {(change.module, change.name): change.new for change in known}
    if shapes:
        changes += [*follow_configs(model, shapes, told, ()).changes, *follow_timm(model, shapes, told)]
    new = {name: _begun(own[name], shape) for name, shape in shapes.items()}
    recipe = recipe_of(model)
    with all_or_nothing(model):
        set_attributes_(model, changes)
        replace_tensors_(model, new)
        recipe.note((change.module, change.name) for change in known)
        recipe.needed = True
    return set(shapes)


def _begun(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of another shape, with the entries that a tensor has there: not all may be loaded next."""
    new = tensor.new_zeros(shape)
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized:
        common = tuple(slice(min(sizes)) for sizes in zip(shape, tensor.shape, strict=True))
        new[common] = tensor.detach()[common]
    return new


def _alike(old: Any, value: Any) -> Any:
    """Return several numbers as a tuple where a module holds a tuple: files hold lists."""
    return tuple(value) if isinstance(old, tuple) and isinstance(value, list) else value


def _refuse_impossible(module: nn.Module, change: AttributeChange, largest: int) -> None:
    """Refuse to write what no cut writes: other attributes than numbers that follow widths, and numbers beyond any.

    Args:
        module: The module that holds the attribute.
        change: What would be written.
        largest: Entries of the largest tensor that is loaded, and so more than any width.
    """
    number = isinstance(change.old, int | np.integer | tuple | list)
    if number and change.old == change.new:
        return
    if not (number and follows_cuts(module, change.name) and _possible(change, largest)):
        raise PruningError(
            f"The pruning metadata asks to set {joined(change.module, change.name)} from {change.old!r} to "
            f"{change.new!r}, which no pruning does: the file is damaged, or of another model. Nothing was changed; "
            "load an earlier checkpoint."
        )


def _possible(change: AttributeChange, largest: int) -> bool:
    """Return whether a number can have become another by a cut: each changes by less than a width does."""
    if isinstance(change.old, tuple | list) != isinstance(change.new, tuple | list):
        return False
    if isinstance(change.old, tuple | list):
        pairs = list(zip(change.old, change.new, strict=False))
        if len(change.old) != len(change.new):
            return False
    else:
        pairs = [(change.old, change.new)]
    return all(is_whole(new) and (new == old or 1 <= new <= max(old, 1) * largest) for old, new in pairs)


def refuse_unloadable(state_dict: Mapping[Any, Any], names: Container[str]) -> None:
    """Refuse a state dict with keys that are no names, or with values that no parameter can be loaded from.

    Raises:
        PruningError: If it has any under one of the names.
    """
    for name, saved in state_dict.items():
        if not isinstance(name, str):
            raise PruningError(f"The state dict has the key {name!r}, which is no name. Load an earlier checkpoint.")
        if name not in names:
            continue
        if not is_tensor_like(saved):
            kind = type(saved).__name__
            raise PruningError(f"{name} is of type {kind} in the state dict, not a tensor. Load an earlier checkpoint.")
        if isinstance(saved, Tensor):
            if saved.is_nested:  # it has no shape
                raise PruningError(f"{name} is a nested tensor in the state dict. Load an earlier checkpoint.")
            refuse_hollow(name, saved)


def _names_of(model: nn.Module) -> dict[str, str]:
    """Return, for every name of a parameter or buffer, the first name of the same tensor."""
    firsts = {id(tensor): name for name, tensor in named_tensors(model).items()}
    return {
        joined(path, leaf): firsts[id(tensor)]
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _tells_all(path: str, module: nn.Module, state_dict: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Return whether a state dict has all tensors of a module that it has any of, with as many dimensions."""
    there = {names[name] for name in state_dict if name in names}
    found = set()
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None or leaf in module._non_persistent_buffers_set:
            continue
        name = joined(path, leaf)
        found.add(names[name] in there)  # of a shared tensor one name is enough
        if name in state_dict and not (isinstance(saved := state_dict[name], Tensor) and saved.dim() == tensor.dim()):
            return False
    return len(found) < 2


def _fitting_masks(path: str, module: nn.Module, state_dict: Mapping[str, Any], masks: PackedMasks) -> PackedMasks:
    """Return masks for the parameters that are loaded, as plain lists.

    Raises:
        PruningError: If one is of another shape than its parameter.
    """
    own = {leaf: parameter for leaf, parameter in module._parameters.items() if parameter is not None}
    for leaf, (_, shape) in masks.items():
        weight = state_dict.get(joined(path, leaf), own.get(leaf))
        if leaf in own and isinstance(weight, Tensor) and not fits(shape, weight.shape):
            raise PruningError(
                f"The pruning metadata has a mask of shape {tuple(shape)} for {joined(path, leaf)}, which is of shape "
                f"{tuple(weight.shape)}: the file is damaged, or of another model. Load an earlier checkpoint."
            )
    return {leaf: [packed.cpu(), list(shape)] for leaf, (packed, shape) in masks.items() if leaf in own}
