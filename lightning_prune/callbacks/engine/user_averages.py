"""Finds averages of the weights that code of users keeps beside the model, and lets them follow a cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prune.structure import named_tensors
from lightning_prune.surgery import Cut, cut_, narrowed, recipe_of, restore_, take_snapshot

__all__ = ["UserAverages", "bring_back_", "cut_tables_", "remembered"]

_BATCHES = 3  # of each epoch, between which averages are seen to move
_Place = tuple[str, str]  # the position and class of its owner, and the attribute
_Table = tuple[str, Any, dict[str, Tensor]]  # path of the part of the model, what holds its tensors, and these by name


class UserAverages:
    """Copies of the model's tensors in callbacks of users, and in attributes of the module, that move every batch.

    A module, a dict by names, or a list in the order of parameters is such a copy if all names and sizes fit. What does
    not move is none: teachers and best weights stay what they are.
    """

    def __init__(self) -> None:
        self._sums: dict[_Place, float] = {}
        self._moving: set[_Place] = set()

    def look(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Note, in the first batches of an epoch, which copies have moved since the batch before."""
        if batch_idx >= _BATCHES:
            return
        before, self._sums = self._sums, {}
        for place, (_, _, tensors) in _copies(trainer, pl_module):
            self._sums[place] = sum(float(tensor.detach().double().sum()) for tensor in tensors.values())
            if batch_idx and self._sums[place] != before.get(place, self._sums[place]):
                self._moving.add(place)

    def moving(self, trainer: Trainer, pl_module: LightningModule) -> dict[_Place, _Table]:
        """Return the copies that move, as they stand before the model is cut, or a cut is taken back."""
        found = _copies(trainer, pl_module) if self._moving else ()
        tables = {id(table[1]): (place, table) for place, table in found if place in self._moving}
        return dict(tables.values())  # found twice, cut once


def remembered(tables: Mapping[_Place, _Table]) -> dict[_Place, Any]:
    """Return what copies hold, so that a cut can be taken back."""
    return {
        place: take_snapshot(holder, ())
        if isinstance(holder, nn.Module)
        else {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for place, (_, holder, tensors) in tables.items()
    }


@torch.no_grad()
def bring_back_(tables: Mapping[_Place, _Table], before: Mapping[_Place, Any]) -> None:
    """Restore what copies held before a cut."""
    for place, (_, holder, tensors) in tables.items():
        held = before.get(place)  # none of a copy that moves only since
        if held is not None and isinstance(holder, nn.Module):
            restore_(holder, (), held)
        elif held is not None:
            for name, tensor in tensors.items():
                tensor.data = held[name].to(tensor.device)


@torch.no_grad()
def cut_tables_(tables: Mapping[_Place, _Table], cut: Cut) -> None:
    """Make in copies the cut that was made in the model."""
    for (owner, name), (path, holder, tensors) in tables.items():
        rank_zero_info(f"The average of weights in {name} of {owner.partition(':')[2]} loses the same units.")
        if isinstance(holder, nn.Module):
            part = _part_of(cut, path)
            recipe_of(holder).needed = True
            cut_(holder, part, part.tensors(holder))
            continue
        for name, tensor in tensors.items():
            if name in cut.kept:
                tensor.data = narrowed(tensor, cut.kept[name])


def _copies(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[_Place, _Table]]:
    """Yield copies of the model's tensors, and where they were found."""
    own = named_tensors(pl_module)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for place, owner in enumerate((pl_module, *callbacks)):
        if owner is not pl_module and _is_known(owner):
            continue
        for name, value in list(vars(owner).items()):
            inner = [] if isinstance(value, nn.Module) or _is_known(value) else getattr(value, "__dict__", {}).items()
            for key, held in ((name, value), *[(f"{name}.{key}", held) for key, held in inner]):
                table = _table(held, own)
                if table is not None:
                    yield (f"{place}:{type(owner).__name__}", key), table


def _table(held: Any, own: Mapping[str, Tensor]) -> _Table | None:
    """Return the tensors of a copy by the names of those that they copy, or None for what is no copy."""
    if isinstance(held, nn.Module):
        inner = getattr(held, "module", None)
        for module in (held, *([inner] if isinstance(inner, nn.Module) else ())):
            path = _path_of(named_tensors(module), own)
            if path is not None:
                return path, module, _under(path, named_tensors(module))
    elif isinstance(held, Mapping):
        found = {name: value for name, value in held.items() if isinstance(value, Tensor) and isinstance(name, str)}
        path = _path_of(found, own)
        return None if path is None else (path, held, _under(path, found))
    elif isinstance(held, Sequence) and held and all(isinstance(value, Tensor) for value in held):
        names = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)]
        found = dict(zip(names, held, strict=False))
        if len(names) == len(held) and _path_of(found, own) == "":
            return "", held, found
    return None


def _path_of(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return the path of the part of the model that tensors copy, "" for all of it, or None if they copy none."""
    first = next(iter(found), None)
    for name in own if first is not None and len(found) > 1 else ():
        path = name.removesuffix(first or "").removesuffix(".")
        if name == f"{path}.{first}".lstrip("."):
            pairs = [(tensor, own.get(name)) for name, tensor in _under(path, found).items()]
            if all(mine is not None and _copies_one(tensor, mine) for tensor, mine in pairs):
                return path
    return None


def _copies_one(tensor: Tensor, mine: Tensor) -> bool:
    return tensor.shape == mine.shape and (tensor.data_ptr() != mine.data_ptr() or not mine.numel())


def _under(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}".lstrip("."): tensor for name, tensor in tensors.items()}


def _part_of(cut: Cut, path: str) -> Cut:
    """Return what a cut changes of a part of the model, by the names that this part has by itself."""
    if not path:
        return cut
    start = f"{path}."
    kept = {name.removeprefix(start): value for name, value in cut.kept.items() if name.startswith(start)}
    shapes = {name.removeprefix(start): value for name, value in cut.shapes.items() if name.startswith(start)}
    scales = {name.removeprefix(start): value for name, value in cut.scales.items() if name.startswith(start)}
    changes = [change for change in cut.attributes if f"{change.module}.".startswith(start)]
    own = tuple(change._replace(module=change.module.removeprefix(path).lstrip(".")) for change in changes)
    return replace(cut, kept=kept, shapes=shapes, scales=scales, attributes=own)


def _is_known(value: Any) -> bool:
    """Return whether an object is of Lightning, torch or this package, which know of averages themselves."""
    return type(value).__module__.partition(".")[0] in ("lightning", "pytorch_lightning", "torch", "lightning_prune")
