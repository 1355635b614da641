"""Numbers the layers of a list anew where some of them were removed: caches of decoders are read by these numbers.

An attention holds which entry of a cache is its own, such as ``layer_idx``, and the length of a cache is that of its
first entry. So the layers that stay take the first numbers. Nothing goes by the names of classes or attributes: an
attribute counts if it is the position of its layer in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.model.calls import modules_of
from lightning_prune.surgery.pass_through import Skipped

__all__ = ["NumberedLayers", "numbered_layers", "renumber_"]


@dataclass(frozen=True, eq=False)
class NumberedLayers:
    """Modules in the layers of one list, each of which holds the position of its layer in the list.

    Attributes:
        path: Path of the list.
        layers: The list.
        inside: Names that lead from a layer to the module that holds the number.
        attribute: What the number is called there.
    """

    path: str
    layers: nn.Module
    inside: tuple[str, ...]
    attribute: str

    def holders(self) -> dict[int, nn.Module]:
        """Return the modules that hold the number, by position in the list as it is now, removed ones too."""
        found: dict[int, nn.Module] = {}
        for position, entry in enumerate(self.layers._modules.values()):
            holder = _whole(entry)
            for name in self.inside:
                holder = None if holder is None else _whole(holder._modules.get(name))
            if holder is not None and self.attribute in vars(holder):
                found[position] = holder
        return found

    def numbers(self, modules: Mapping[str, nn.Module]) -> dict[int, int]:
        """Return the number of each holder, by position: those that were not removed have the first of their kind.

        Args:
            modules: The modules of the model by path, some of which may hold a config that lists kinds.
        """
        entries = list(self.layers._modules.values())
        kinds = _kinds(modules, self.path, len(entries))
        positions = list(self.holders())
        free: dict[Any, list[int]] = {}
        for position in positions:
            free.setdefault(kinds[position], []).append(position)
        stay = [position for position in positions if not _gave_its_number(entries[position], self.inside)]
        gone = [position for position in positions if position not in stay]
        return {position: free[kinds[position]].pop(0) for position in (*stay, *gone)}


def numbered_layers(model: nn.Module) -> list[NumberedLayers]:
    """Find the numbers that modules hold of the positions of layers in a list; some layers may have been removed."""
    found: list[NumberedLayers] = []
    modules = dict(modules_of(model))
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        places: dict[tuple[tuple[str, ...], str], int] = {}
        for entry in module._modules.values():
            for place in _whole_numbers(entry, ()):
                places[place] = places.get(place, 0) + 1
        for (inside, attribute), count in places.items():
            numbered = NumberedLayers(path, module, inside, attribute)
            if count > 1 and _agree(numbered, modules):
                found.append(numbered)
    return found


def renumber_(model: nn.Module, found: Iterable[NumberedLayers]) -> None:
    """Set the numbers that follow from which layers are there now.

    Args:
        model: The model.
        found: What :func:`numbered_layers` returned before layers were removed or brought back.
    """
    modules = dict(modules_of(model))
    for numbered in found:
        holders = numbered.holders()
        for position, number in numbered.numbers(modules).items():
            vars(holders[position])[numbered.attribute] = number


def _agree(numbered: NumberedLayers, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether modules hold the numbers that follow from which layers are there."""
    holders = numbered.holders()
    held = {position: vars(holder)[numbered.attribute] for position, holder in holders.items()}
    if any(type(number) is not int for number in held.values()) or sorted(held.values()) != list(held):
        return False
    return held == numbered.numbers(modules)


def _whole(module: nn.Module | None) -> nn.Module | None:
    """Return a module, or the one that stood in its place before it was removed."""
    return module.layer if isinstance(module, Skipped) else module


def _whole_numbers(entry: nn.Module | None, inside: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield where modules of other code hold whole numbers, in a layer or in what was removed of it."""
    module = _whole(entry)
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return
    if not type(module).__module__.startswith("torch.nn."):
        for name, value in vars(module).items():
            if type(value) is int:
                yield inside, name
    for name, child in module._modules.items():
        yield from _whole_numbers(child, (*inside, name))


def _gave_its_number(module: nn.Module | None, inside: tuple[str, ...]) -> bool:
    """Return whether a module was removed, itself or with one around it, and others took its number."""
    for name in (*inside, ""):
        if isinstance(module, Skipped) and module.skip["renumber"]:
            return True
        module = _whole(module)
        if module is not None and name:
            module = module._modules.get(name)
    return False


def _kinds(modules: Mapping[str, nn.Module], path: str, count: int) -> list[Any]:
    """Return the kind of the cache's entry at each position, as Hugging Face configs list it; one for all otherwise."""
    while True:
        config = getattr(modules.get(path), "config", None)
        kinds = getattr(config, "layer_types", None)
        if isinstance(kinds, list | tuple) and len(kinds) == count:
            return list(kinds)
        if not path:
            return [None] * count
        path = path.rpartition(".")[0]
