"""What a model costs, now and once units have gone, worked out from its structure; runs nothing and decides nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.measure.flops import FlopCount, UntraceableError, count_flops
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.structure import Keep, Structure, find_structure, trace
from lightning_prune.structure.labels import Cost
from lightning_prune.structure.width_ties import Without, left

__all__ = ["Footprint", "count", "measure", "saved_by_one_unit"]


@dataclass(frozen=True)
class Footprint:
    """What a model costs: its parameters, and the multiply-adds of one forward pass on the example inputs."""

    params: int
    flops: int


def count(model: nn.Module, example_inputs: ExampleInputs, structure: Structure | None = None) -> FlopCount:
    """Count the multiply-adds of a model; where ``torch.jit`` cannot trace it, by what its own trace tells.

    Args:
        model: Any module that runs.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        structure: What a trace of the model found, if that is known; else it is traced if need be.

    Raises:
        PruningError: If the model fails on the inputs or returns no tensor.
    """
    try:
        return count_flops(model, example_inputs)
    except UntraceableError:
        found = find_structure(trace(model, example_inputs)) if structure is None else structure
        by_operator = {name: round(flops) for name, flops in found.costs_by_operator(found.alive({})).items()}
        told = "by the trace of the structure, not layer by layer, since torch.jit cannot trace the model"
        return FlopCount(found.flops({}), {}, by_operator, {}, told)


def measure(model: nn.Module, structure: Structure, keep: Keep, uncounted: int = 0) -> Footprint:
    """Predict what the model costs once the units with ``keep == False`` have gone.

    ``uncounted`` are multiply-adds that the structure does not know of.
    """
    alive = structure.alive(keep)
    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for slot in structure.ledger.slots:
        if slot.tensor in sizes:
            sizes[slot.tensor][slot.dim] = int(alive[slot.start : slot.start + slot.size].sum())
    return Footprint(sum(map(math.prod, sizes.values())), structure.flops(keep) + uncounted)


def saved_by_one_unit(model: nn.Module, structure: Structure) -> dict[str, Footprint]:
    """Predict, for each group, what goes with one of its units.

    Each group is asked for the tensors and operators that it is part of alone, so that time grows with the depth of a
    model and not with its square.
    """
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ranges: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for slot in structure.ledger.slots:
        ranges[slot.tensor].append((slot.dim, slot.start, slot.size))
    costs = _costs_of_groups(structure)
    saved = {}
    for name, group in structure.groups.items():
        without = Without(structure.component, structure.units[name][:1])
        params = 0
        for tensor in {slot.tensor for slot in group.slots} & sizes.keys():
            slim = list(sizes[tensor])
            for dim, start, size in ranges[tensor]:
                slim[dim] = int(np.count_nonzero(without[np.arange(start, start + size)]))
            params += math.prod(sizes[tensor]) - math.prod(slim)
        flops = 0.0
        for cost in costs[name]:
            whole = math.prod(len(labels[0].atoms) for labels in cost.sizes)
            flops += cost.factor * (whole - math.prod(left(labels, without) for labels in cost.sizes))
        saved[name] = Footprint(params, round(flops))
    return saved


def _costs_of_groups(structure: Structure) -> Mapping[str, list[Cost]]:
    """Find for each group the operators whose cost it has a part in."""
    names = list(structure.units)
    group_of: NDArray[np.int64] = np.full(len(structure.component), -1)
    for which, roots in enumerate(structure.units.values()):
        group_of[roots] = which
    known: dict[int, set[int]] = {}  # by ``id`` of the atoms, which many operators share
    found: dict[str, list[Cost]] = defaultdict(list)
    for cost in structure.ledger.costs:
        touched: set[int] = set()
        for label in (label for labels in cost.sizes for label in labels):
            if id(label.atoms) not in known:
                known[id(label.atoms)] = set(np.unique(group_of[structure.component[label.atoms]]).tolist()) - {-1}
            touched |= known[id(label.atoms)]
        for which in touched:
            found[names[which]].append(cost)
    return found
