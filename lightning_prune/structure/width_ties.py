"""Width ties: groups that must keep the same fraction, because numbers in the code tie their widths to each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import Attribute, Equation, Label, Ledger
from lightning_prune.structure.solve_ints import Place, place_of, worked_back
from lightning_prune.structure.traced_ints import Held, Number, Size, leaves

__all__ = ["Alive", "Counts", "Without", "find_links", "left"]


class Alive(Protocol):
    """Which atoms are kept: an array of all of them, or an object that computes it on demand."""

    def __getitem__(self, atoms: Any, /) -> Any:
        """Return whether each atom is kept, in the shape of ``atoms``."""


def left(labels: Sequence[Label], alive: Alive) -> int:
    """Count the indices along a dimension that keep all their labels."""
    keeping = alive[labels[0].atoms]
    for label in labels[1:]:
        keeping = keeping & alive[label.atoms]
    return int(np.count_nonzero(keeping))


@dataclass(frozen=True, eq=False)
class Counts:
    """The values of numbers after pruning.

    Attributes:
        first: For each place where a module holds a number, the labels it counts.
        alive: Which atoms are kept.
    """

    first: Mapping[Place, Attribute]
    alive: Alive

    def __call__(self, origin: Held | Size, value: int) -> int:
        """Return the new value of a number of this origin; its old ``value`` if nothing determines it."""
        if isinstance(origin, Size):
            return left(origin.labels, self.alive)
        attribute = self.first.get(place_of(origin))
        return value if attribute is None else self.held(attribute)

    def held(self, attribute: Attribute) -> int:
        """Return the new value of a module's attribute."""
        count = left(attribute.labels, self.alive)
        if attribute.number is None:
            return count
        return worked_back(attribute.number, place_of(attribute), count, self)


@dataclass(frozen=True, eq=False)
class Without:
    """Which atoms are kept without some units; cheaper than an array of all atoms for each group."""

    component: NDArray[np.int64]
    gone: NDArray[np.int64]

    def __getitem__(self, atoms: NDArray[np.int64], /) -> NDArray[np.bool_]:
        roots = self.component[atoms]
        if len(self.gone) == 1:  # the common case, without a table
            return roots != self.gone[0]
        return self._stays[roots]

    @cached_property
    def _stays(self) -> NDArray[np.bool_]:
        stays = np.ones(len(self.component), dtype=bool)
        stays[self.gone] = False
        return stays


@dataclass(frozen=True, eq=False)
class _Tie:
    """Counts of labels that must agree, because one number stands for all of them."""

    agree: Callable[[Alive], bool]
    groups: frozenset[str]
    where: str


def find_links(
    ledger: Ledger, component: NDArray[np.int64], units: Mapping[str, NDArray[np.int64]]
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Find the groups that can only be pruned together.

    Each group is tried alone, with arithmetic on the counts of labels. If a number would need two values at once, all
    groups that it depends on are tried together, each losing the same fraction.

    Args:
        ledger: The trace.
        component: Component of every atom.
        units: Group name -> component of each of its units.

    Returns:
        The groups that must keep the same fraction, and those that cannot be pruned even so, with the reason.
    """
    ties = _ties(ledger, component, units)
    broken = _broken_alone(ties, component, units)
    order = {name: place for place, name in enumerate(units)}
    links, stuck = [], {}
    for names in _classes(broken):
        # The smallest cut that takes the same fraction of every group: one part in the widths' common divisor.
        steps = math.gcd(*(len(units[name]) for name in names))
        gone = np.concatenate([units[name][: len(units[name]) // steps] for name in names])
        together = Without(component, gone)
        failed = [tie for tie in ties if tie.groups & names and not tie.agree(together)]
        if steps > 1 and len(names) > 1 and not failed:
            links.append(tuple(sorted(names, key=order.__getitem__)))
            continue
        blamed = failed or [tie for tie in broken if tie.groups & names]
        stuck.update(dict.fromkeys(names, f"a number in the code fixes its width ({blamed[0].where})"))
    return links, stuck


def _broken_alone(
    ties: Sequence[_Tie], component: NDArray[np.int64], units: Mapping[str, NDArray[np.int64]]
) -> list[_Tie]:
    """Return the ties that one of their groups breaks when it alone loses a unit."""
    broken = []
    for tie in ties:
        for name in tie.groups:
            if not tie.agree(Without(component, units[name][:1])):
                broken.append(tie)
                break
    return broken


def _ties(ledger: Ledger, component: NDArray[np.int64], units: Mapping[str, NDArray[np.int64]]) -> list[_Tie]:
    """Return a tie for every two uses of one attribute, and for every equation, that depend on some group."""
    asked: dict[Place, list[Attribute]] = defaultdict(list)
    for attribute in ledger.attributes:
        asked[place_of(attribute)].append(attribute)
    first = {place: same[0] for place, same in asked.items()}
    names = list(units)
    group_of = np.full(len(component), -1)
    for which, roots in enumerate(units.values()):
        group_of[roots] = which

    def groups(labels: Iterable[Label]) -> frozenset[str]:
        found: set[int] = set()
        for label in labels:
            found.update(np.unique(group_of[component[label.atoms]]).tolist())
        return frozenset(names[which] for which in found if which >= 0)

    ties = []
    for same in asked.values():
        for other in same[1:]:
            if involved := groups((*same[0].labels, *other.labels)):
                ties.append(_Tie(_equal(same[0], other), involved, other.where))
    for equation in ledger.equations:
        counted = list(equation.labels)
        for origin, _ in leaves(equation.number):
            counted += _counted(origin, first)
        if involved := groups(counted):
            ties.append(_Tie(_holds(equation, first), involved, equation.where))
    return ties


def _counted(origin: Held | Size, first: Mapping[Place, Attribute]) -> tuple[Label, ...]:
    """Return the labels that a number of this origin counts."""
    if isinstance(origin, Size):
        return origin.labels
    attribute = first.get(place_of(origin))
    return attribute.labels if attribute else ()


def _equal(one: Attribute, other: Attribute) -> Callable[[Alive], bool]:
    return lambda alive: left(one.labels, alive) == left(other.labels, alive)


def _holds(equation: Equation, first: Mapping[Place, Attribute]) -> Callable[[Alive], bool]:
    def agree(alive: Alive) -> bool:
        try:
            number = equation.number
            wanted = number.evaluate(Counts(first, alive)) if isinstance(number, Number) else number
            return left(equation.labels, alive) == wanted
        except ZeroDivisionError:  # the divisor has been pruned to zero
            return False

    return agree


def _classes(ties: Iterable[_Tie]) -> list[set[str]]:
    """Return the sets of groups that ties connect, directly or through each other."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for tie in ties:
        first = root(min(tie.groups))
        for name in sorted(tie.groups):
            parent[root(name)] = first
    classes: dict[str, set[str]] = defaultdict(set)
    for name in parent:
        classes[root(name)].add(name)
    return list(classes.values())
