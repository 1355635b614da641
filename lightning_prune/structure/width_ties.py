"""Which groups must shrink alike because numbers in the code tie their widths together; knows no operator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import Attribute, Equation, Label, Ledger
from lightning_prune.structure.solve_ints import Place, place_of, worked_back
from lightning_prune.structure.traced_ints import Held, Number, Size, leaves

__all__ = ["Alive", "Counts", "Without", "find_links", "left"]


class Alive(Protocol):
    """Tells of atoms whether they are left: an array of all of them, or something that works it out when asked."""

    def __getitem__(self, atoms: Any, /) -> Any:
        """Return of each atom whether it is left, in the shape of ``atoms``."""


def left(labels: Sequence[Label], alive: Alive) -> int:
    """Count the indices along a dimension that keep all their labels."""
    keeping = alive[labels[0].atoms]
    for label in labels[1:]:
        keeping = keeping & alive[label.atoms]
    return int(np.count_nonzero(keeping))


@dataclass(frozen=True, eq=False)
class Counts:
    """Tells what numbers become once some units have gone.

    Attributes:
        first: For each place where a module holds a number, what it follows.
        alive: Which atoms are left.
    """

    first: Mapping[Place, Attribute]
    alive: Alive

    def __call__(self, origin: Held | Size, value: int) -> int:
        """Return what a number of this origin becomes; ``value`` where nothing tells."""
        if isinstance(origin, Size):
            return left(origin.labels, self.alive)
        attribute = self.first.get(place_of(origin))
        return value if attribute is None else self.held(attribute)

    def held(self, attribute: Attribute) -> int:
        """Return what a module must hold."""
        count = left(attribute.labels, self.alive)
        if attribute.number is None:
            return count
        return worked_back(attribute.number, place_of(attribute), count, self)


@dataclass(frozen=True, eq=False)
class Without:
    """Tells which atoms are left when some units have gone; an array of all atoms for each group would cost more."""

    component: NDArray[np.int64]
    gone: NDArray[np.int64]

    def __getitem__(self, atoms: NDArray[np.int64], /) -> NDArray[np.bool_]:
        roots = self.component[atoms]
        return roots != self.gone[0] if len(self.gone) == 1 else ~np.isin(roots, self.gone)


@dataclass(frozen=True, eq=False)
class _Tie:
    """Counts of labels that must agree: what one number is asked to be in several places."""

    agree: Callable[[Alive], bool]
    groups: frozenset[str]
    where: str


def find_links(
    ledger: Ledger, component: NDArray[np.int64], units: Mapping[str, NDArray[np.int64]]
) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Find the groups that can only shrink together.

    Each group is tried by itself, on numbers alone: where a number would then have to be two things at once, the groups
    it hangs on are tried together, each losing the same share.

    Args:
        ledger: What the trace wrote down.
        component: Component of every atom.
        units: Group name -> component of each of its units.

    Returns:
        The groups that must keep the same share, and the groups that cannot shrink even so, with the reason.
    """
    ties = _ties(ledger, component, units)
    tied: dict[str, list[int]] = defaultdict(list)  # group -> which ties it is part of
    for which, tie in enumerate(ties):
        for name in tie.groups:
            tied[name].append(which)
    alone = {name: Without(component, units[name][:1]) for name in tied}
    broken = {which for which, tie in enumerate(ties) if not all(tie.agree(alone[name]) for name in tie.groups)}
    order = {name: place for place, name in enumerate(units)}
    links, stuck = [], {}
    for names in _classes(ties[which] for which in sorted(broken)):
        steps = math.gcd(*(len(units[name]) for name in names))
        gone = np.concatenate([units[name][: len(units[name]) // steps] for name in names])
        together = Without(component, gone)
        own = sorted({which for name in names for which in tied[name]})
        failed = [which for which in own if not ties[which].agree(together)]
        if steps > 1 and len(names) > 1 and not failed:
            links.append(tuple(sorted(names, key=order.__getitem__)))
        else:
            where = ties[(failed or [which for which in own if which in broken])[0]].where
            stuck.update(dict.fromkeys(names, f"a number in the code fixes its width ({where})"))
    return links, stuck


def _ties(ledger: Ledger, component: NDArray[np.int64], units: Mapping[str, NDArray[np.int64]]) -> list[_Tie]:
    asked: dict[Place, list[Attribute]] = defaultdict(list)
    for attribute in ledger.attributes:
        asked[place_of(attribute)].append(attribute)
    first = {place: same[0] for place, same in asked.items()}
    names = list(units)
    group_of = np.full(len(component), -1)
    for which, roots in enumerate(units.values()):
        group_of[roots] = which

    def groups(labels: Iterable[Label]) -> frozenset[str]:
        found = {int(which) for label in labels for which in np.unique(group_of[component[label.atoms]])}
        return frozenset(names[which] for which in found if which >= 0)

    ties = []
    for same in asked.values():
        for other in same[1:]:
            if hung := groups((*same[0].labels, *other.labels)):
                ties.append(_Tie(_equal(same[0], other), hung, other.where))
    for equation in ledger.equations:
        counted_in = [label for origin, _ in leaves(equation.number) for label in _counted(origin, first)]
        if hung := groups((*equation.labels, *counted_in)):
            ties.append(_Tie(_holds(equation, first), hung, equation.where))
    return ties


def _counted(origin: Held | Size, first: Mapping[Place, Attribute]) -> tuple[Label, ...]:
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
        except ZeroDivisionError:  # nothing is left of what a number is divided by
            return False

    return agree


def _classes(ties: Iterable[_Tie]) -> list[set[str]]:
    """Join the groups of ties that share one."""
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
