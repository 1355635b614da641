"""Numbers the layers of a list anew where some of them were removed: caches of decoders are read by these numbers.

An attention holds which entry of a cache is its own, such as ``layer_idx``, and the length of a cache is that of its
first entry. So the layers that stay take the first numbers. Nothing goes by the names of classes or attributes: an
attribute counts if it is the position of its layer in a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        layers: The list.
        inside: Names that lead from a layer to the module that holds the number.
        attribute: What the number is called there.
        holders: Position in the list -> that module, removed ones too.
        kinds: The kind of the cache's entry at each position.
    """

    layers: nn.Module
    inside: tuple[str, ...]
    attribute: str
    holders: dict[int, nn.Module]
    kinds: list[Any]

    def numbers(self) -> dict[int, int]:
        """Return the number of each holder, by position: those that were not removed have the first of their kind."""
        entries = list(self.layers._modules.values())
        free: dict[Any, list[int]] = {}
        for position in sorted(self.holders):
            free.setdefault(self.kinds[position], []).append(position)
        stays: list[int] = []
        gone: list[int] = []
        for position in sorted(self.holders):
            (gone if _gave_its_number(entries[position], self.inside) else stays).append(position)
        return {position: free[self.kinds[position]].pop(0) for position in (*stays, *gone)}

    def agree(self) -> bool:
        """Return whether the holders have these numbers."""
        return all(vars(self.holders[at])[self.attribute] == number for at, number in self.numbers().items())


def numbered_layers(model: nn.Module) -> list[NumberedLayers]:
    """Find the numbers that modules hold of the positions of layers in a list; some layers may have been removed."""
    found: list[NumberedLayers] = []
    modules = dict(modules_of(model))
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        kinds = _kinds(modules, path, len(module))
        holders: dict[tuple[tuple[str, ...], str], dict[int, nn.Module]] = {}
        for position, entry in enumerate(module._modules.values()):
            for inside, holder, attribute in _whole_numbers(entry, ()):
                holders.setdefault((inside, attribute), {})[position] = holder
        for (inside, attribute), of_positions in holders.items():
            numbered = NumberedLayers(module, inside, attribute, of_positions, kinds)
            if len(of_positions) > 1 and numbered.agree():
                found.append(numbered)
    return found


def renumber_(found: list[NumberedLayers]) -> None:
    """Set the numbers that follow from which layers are there now.

    Args:
        found: What :func:`numbered_layers` returned before layers were removed or brought back.
    """
    for numbered in found:
        for position, number in numbered.numbers().items():
            vars(numbered.holders[position])[numbered.attribute] = number


def _whole_numbers(
    module: nn.Module | None, inside: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], nn.Module, str]]:
    """Yield the whole numbers that modules of other code hold, in a layer or in what was removed of it."""
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return
    if isinstance(module, Skipped):
        module = module.layer
    if not type(module).__module__.startswith("torch.nn."):
        for name, value in vars(module).items():
            if type(value) is int:
                yield inside, module, name
    for name, child in module._modules.items():
        yield from _whole_numbers(child, (*inside, name))


def _gave_its_number(module: nn.Module | None, inside: tuple[str, ...]) -> bool:
    """Return whether a module was removed, itself or with one around it, and others took its number."""
    for name in (*inside, ""):
        if isinstance(module, Skipped):
            if module.skip["renumber"]:
                return True
            module = module.layer
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
