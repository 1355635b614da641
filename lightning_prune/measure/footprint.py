"""What a model costs, now and once units have gone, worked out from its structure; runs nothing and decides nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.measure.flops import BY_TRACE, FlopCount, UntraceableError, count_flops, may_multiply
from lightning_prune.model.calls import ExampleInputs, modules_of
from lightning_prune.structure import Keep, Structure, find_structure, trace
from lightning_prune.structure.costs import COSTS
from lightning_prune.structure.labels import Cost
from lightning_prune.structure.tensor_names import named_parameters
from lightning_prune.structure.width_ties import Without, left

__all__ = ["WHOLE", "Footprint", "Part", "count", "count_traced", "measure", "saved_by_one_unit"]

_WHOLE: Keep = {}


class Part(NamedTuple):
    """The part of a model that is pruned and counted, by paths of modules.

    Attributes:
        inside: The modules that it is made of; by default the whole model.
        outside: Modules in these that do not belong to it.
    """

    inside: tuple[str, ...] = ("",)
    outside: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        """Return whether a module, parameter or buffer belongs to the part."""
        if self is WHOLE:
            return True
        above = {*_itself_and_above(path)}
        return not above.isdisjoint(self.inside) and above.isdisjoint(self.outside)

    def params(self, model: nn.Module) -> int:
        """Count the parameters of the part, shared ones once."""
        return sum(parameter.numel() for name, parameter in named_parameters(model).items() if self.holds(name))

    def flops(self, structure: Structure, keep: Keep) -> int:
        """Predict the multiply-adds that operators called in the part take once units have gone."""
        ledger, counts = structure.ledger, structure.multiply_adds(keep)
        if self == WHOLE:
            return sum(counts)
        return sum(
            flops for cost, flops in zip(ledger.costs, counts, strict=True) if self.holds(ledger.ran[cost.at].path)
        )

    def counted(self, flops: FlopCount) -> int:
        """Return the share of a count that belongs to the part."""
        of_outside = [flops.by_module.get(path, 0) for path in self.outside if Part(self.inside).holds(path)]
        return sum(flops.by_module.get(path, 0) for path in self.inside) - sum(of_outside)


WHOLE = Part()


@dataclass(frozen=True)
class Footprint:
    """What a model costs: its parameters, and the multiply-adds of one forward pass on the example inputs."""

    params: int
    flops: int


def count_traced(model: nn.Module, structure: Structure, keep: Keep = _WHOLE) -> FlopCount:
    """Count the multiply-adds of a model from its trace, without running it.

    The count is fvcore's: the same operators count, and only those that an output depends on.

    Args:
        model: The model that ``structure`` was traced from, before or after a cut.
        structure: What the trace found.
        keep: For every group which units are kept, all by default.
    """
    ledger = structure.ledger
    by_module = dict.fromkeys([path for path, _ in modules_of(model)], 0)
    by_operator: Counter[str] = Counter()
    for cost, flops in zip(ledger.costs, structure.multiply_adds(keep), strict=True):
        by_operator[cost.operator] += flops
        for path in _itself_and_above(ledger.ran[cost.at].path):
            by_module[path] += flops
    kinds = [ledger.ran[at].func for at in sorted(ledger.needed)]
    free = Counter([f"{func.namespace}::{func._opname}" for func in kinds if str(func.overloadpacket) not in COSTS])
    uncounted = {kind: calls for kind, calls in free.items() if may_multiply(kind)}
    return FlopCount(by_module[""], by_module, dict(by_operator), uncounted, BY_TRACE)


def count(
    model: nn.Module, example_inputs: ExampleInputs, structure: Structure | None = None, keep: Keep = _WHOLE
) -> FlopCount:
    """Count the multiply-adds of a model by fvcore, or by the label trace where fvcore cannot.

    The trace counts, too, where the two differ, since plans are made with its numbers. ``counted`` of the result says
    which of them counted, and why.

    Args:
        model: Any module that runs.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.
        structure: What a trace of the model found; by default the model is traced. With it, nothing raises.
        keep: For every group of ``structure`` which units are kept, where the model was cut since it was traced.

    Raises:
        PruningError: If the model fails on the inputs or returns no tensor.
    """
    if structure is None:
        structure = find_structure(trace(model, example_inputs))
    traced = count_traced(model, structure, keep)
    try:
        found = count_flops(model, example_inputs)
    except Exception as error:  # whatever it is, the trace has run, and a count must not end a run
        why = f"{type(error).__name__}: {error}" if not isinstance(error, UntraceableError) else error.reason
        return replace(traced, counted=f"{BY_TRACE}, since fvcore cannot: {why}")
    if found.total != traced.total:
        return replace(traced, counted=f"{BY_TRACE}; fvcore finds {found.total:,}, see count_flops")
    return found


def _itself_and_above(path: str) -> list[str]:
    """Return the path of a module and of all that it is part of.

    Examples:
        >>> _itself_and_above("body.0.conv")
        ['', 'body', 'body.0', 'body.0.conv']
    """
    names = path.split(".") if path else []
    return [".".join(names[:depth]) for depth in range(len(names) + 1)]


def measure(model: nn.Module, structure: Structure, keep: Keep, part: Part = WHOLE) -> Footprint:
    """Predict what the model, or a part of it, costs once the units with ``keep == False`` have gone."""
    before = np.concatenate([[0], np.cumsum(structure.alive(keep))])  # how many atoms are kept before each
    sizes = {name: list(parameter.shape) for name, parameter in named_parameters(model).items() if part.holds(name)}
    for slot in structure.ledger.slots:
        if slot.tensor in sizes:
            sizes[slot.tensor][slot.dim] = int(before[slot.start + slot.size] - before[slot.start])
    return Footprint(sum(map(math.prod, sizes.values())), part.flops(structure, keep))


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
        flops = 0
        for cost in costs[name]:
            whole = math.prod(len(labels[0].atoms) for labels in cost.sizes)
            flops += cost.factor * (whole - math.prod(left(labels, without) for labels in cost.sizes))
        saved[name] = Footprint(params, flops)
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
