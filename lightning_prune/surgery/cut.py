"""Cuts units out of a model: works out what a cut changes, proves it, and only then writes; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.model.calls import modules_of
from lightning_prune.structure import Keep, Structure, named_tensors
from lightning_prune.structure.solve_ints import place_of
from lightning_prune.structure.width_ties import Counts
from lightning_prune.surgery.attributes import AttributeChange, held_number, set_attributes_, shape_attributes
from lightning_prune.surgery.recipe import recipe_of
from lightning_prune.surgery.resize import (
    Kept,
    all_or_nothing,
    followed,
    narrowed,
    refuse_state_aside,
    replace_tensors_,
    with_wrapped,
)

__all__ = ["Cut", "SlimValues", "cut_", "draft"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What a cut changes, worked out and not yet done.

    Attributes:
        keep: For each group that loses units, which of them stay.
        kept: For each tensor that changes, dimension -> indices kept.
        shapes: For each tensor that changes, its new shape.
        attributes: Attributes of modules that change.
        scales: For each tensor that is also scaled, dimension and factors along it, ``(size after,)``.
    """

    keep: Keep
    kept: Kept
    shapes: dict[str, tuple[int, ...]]
    attributes: tuple[AttributeChange, ...]
    scales: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the slim values of every tensor that changes; the model keeps its own."""
        own = named_tensors(model)
        slim = {name: narrowed(own[name], kept) for name, kept in self.kept.items()}
        for name, (dim, factors) in self.scales.items():
            value = slim.get(name, own[name].detach())
            slim[name] = value * factors.to(value).view([-1 if other == dim else 1 for other in range(value.dim())])
        return slim


class SlimValues:
    """The slim values of everything that a cut changes, made when they are first asked for, by :meth:`Cut.tensors`."""

    def __init__(self, cut: Cut, model: nn.Module) -> None:
        """Remember the cut and the model."""
        self.cut, self._model = cut, model
        self._made: dict[str, Tensor] | None = None

    def __call__(self) -> dict[str, Tensor]:
        """Return the values, by name."""
        if self._made is None:
            self._made = self.cut.tensors(self._model)
        return self._made


def draft(model: nn.Module, structure: Structure, keep: Keep) -> Cut:
    """Work out what giving up the units with ``keep == False`` changes; the model is not touched."""
    keep = {name: kept for name, kept in keep.items() if not kept.all()}
    own = named_tensors(model)
    stay: dict[tuple[str, int], np.ndarray] = {}
    for name, stays in keep.items():
        left: dict[int, np.ndarray] = {}  # most slots of a group share the array of their units
        for slot in structure.groups[name].slots:
            place = slot.tensor, slot.dim
            if id(slot.units) not in left:
                left[id(slot.units)] = (slot.units < 0) | stays[slot.units]
            mine = left[id(slot.units)]
            stay[place] = stay[place] & mine if place in stay else mine
    kept: Kept = {}
    indices: dict[int, Tensor] = {}
    for (tensor, dim), stays in stay.items():
        if id(stays) not in indices:
            indices[id(stays)] = torch.from_numpy(np.flatnonzero(stays))
        kept.setdefault(tensor, {})[dim] = indices[id(stays)]
    shapes = {
        name: tuple([dims[d].numel() if d in dims else size for d, size in enumerate(own[name].shape)])
        for name, dims in kept.items()
    }
    alive = structure.alive(keep)
    return Cut(keep, kept, shapes, tuple(shape_attributes(model, shapes, _counted(model, structure, alive))))


def cut_(model: nn.Module, cut: Cut, tensors: dict[str, Tensor], optimizers: Iterable[Optimizer] = ()) -> None:
    """Write a cut into the model, the masks that it carries and the state of its optimizers, or nothing of it.

    Parameters stay the same objects, and what has gathered in their gradients is cut like themselves. Whatever stops
    the writing, Ctrl-C or a lack of memory, the model is whole afterwards, or cut.

    Raises:
        PruningError: If an optimizer's state does not fit its parameters. Nothing is written then.
    """
    own, optimizers = named_tensors(model), with_wrapped(optimizers)
    for optimizer in optimizers:
        refuse_state_aside(optimizer)
    parameters = [(tensor, kept) for name, kept in cut.kept.items() if isinstance(tensor := own[name], nn.Parameter)]
    states = [
        (optimizer.state[parameter], followed(optimizer, parameter, kept))
        for optimizer in optimizers
        for parameter, kept in parameters
        if parameter in optimizer.state
    ]
    gradients = [(p, narrowed(p.grad, kept)) for p, kept in parameters if p.grad is not None]
    recipe = recipe_of(model)
    masks = recipe.followed(cut.kept)
    with all_or_nothing(model, optimizers):
        for state, slim in states:
            state.update(slim)
        recipe.note_buffers_(cut.kept)
        replace_tensors_(model, tensors)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_attributes_(model, cut.attributes)
        recipe.write_masks_(masks)
        recipe.needed = True


def _counted(model: nn.Module, structure: Structure, alive: np.ndarray) -> list[AttributeChange]:
    """Work out the attributes that count labels: ``groups``, ``num_groups``, ``normalized_shape``."""
    changes: dict[tuple[str, str], AttributeChange] = {}
    modules = dict(modules_of(model))
    counts = Counts({place_of(attribute): attribute for attribute in reversed(structure.ledger.attributes)}, alive)
    for attribute in structure.ledger.attributes:
        old = held_number(modules[attribute.module], attribute.name)
        count = counts.held(attribute)
        new = changes[place].new if (place := (attribute.module, attribute.name)) in changes else old
        if attribute.index is None:
            new = count
        else:
            new = type(new)((*new[: attribute.index], count, *new[attribute.index + 1 :]))
        changes[place] = AttributeChange(attribute.module, attribute.name, old, new)
    return list(changes.values())
