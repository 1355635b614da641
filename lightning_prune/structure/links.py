"""Which groups must shrink alike because numbers in the code tie their widths together; knows no operator."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import Attribute, Equation, Label, Ledger
from lightning_prune.structure.numbers import Held, Number, Size

__all__ = ["find_links", "left"]

Alive = NDArray[np.bool_]
Place = tuple[str, str, int | None]


def left(labels: Sequence[Label], alive: Alive) -> int:
    """Count the indices along a dimension that keep all their labels."""
    return int(np.logical_and.reduce([alive[label.atoms] for label in labels]).sum())


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
    group_of = {int(root): name for name, roots in units.items() for root in roots}
    ties = _ties(ledger, component, group_of)

    def alive_without(gone: Mapping[str, int]) -> Alive:
        roots = np.ones(ledger.size, dtype=bool)
        for name, count in gone.items():
            roots[units[name][:count]] = False
        return roots[component]

    alone = {name: alive_without({name: 1}) for tie in ties for name in tie.groups}
    broken = [tie for tie in ties if not all(tie.agree(alone[name]) for name in tie.groups)]
    links, stuck = [], {}
    for names in _classes(broken):
        steps = math.gcd(*(len(units[name]) for name in names))
        together = alive_without({name: len(units[name]) // steps for name in names})
        failed = [tie for tie in ties if tie.groups & names and not tie.agree(together)]
        if steps > 1 and len(names) > 1 and not failed:
            links.append(tuple(name for name in units if name in names))
        else:
            where = (failed or [tie for tie in broken if tie.groups & names])[0].where
            stuck.update(dict.fromkeys(names, f"a number in the code fixes its width ({where})"))
    return links, stuck


def _ties(ledger: Ledger, component: NDArray[np.int64], group_of: Mapping[int, str]) -> list[_Tie]:
    asked: dict[Place, list[Attribute]] = defaultdict(list)
    for attribute in ledger.attributes:
        asked[attribute.module, attribute.name, attribute.index].append(attribute)

    def groups(labels: Iterable[Label]) -> frozenset[str]:
        roots = np.unique(np.concatenate([component[label.atoms] for label in labels] or [np.empty(0, np.int64)]))
        return frozenset(group_of[root] for root in roots.tolist() if root in group_of)

    def counted(origin: Held | Size) -> tuple[Label, ...]:
        if isinstance(origin, Size):
            return origin.labels
        found = asked.get((origin.module, origin.name, origin.index))
        return found[0].labels if found else ()

    ties = []
    for same in asked.values():
        for other in same[1:]:
            if hung := groups((*same[0].labels, *other.labels)):
                ties.append(_Tie(_equal(same[0], other), hung, other.where))
    for equation in ledger.equations:
        counted_in = [label for origin in _origins(equation.number) for label in counted(origin)]
        if hung := groups((*equation.labels, *counted_in)):
            ties.append(_Tie(_holds(equation, counted), hung, equation.where))
    return ties


def _equal(one: Attribute, other: Attribute) -> Callable[[Alive], bool]:
    return lambda alive: left(one.labels, alive) == left(other.labels, alive)


def _holds(equation: Equation, counted: Callable[[Held | Size], tuple[Label, ...]]) -> Callable[[Alive], bool]:
    def agree(alive: Alive) -> bool:
        def count(origin: Held | Size, value: int) -> int:
            labels = counted(origin)
            return left(labels, alive) if labels else value

        return left(equation.labels, alive) == equation.number.evaluate(count)

    return agree


def _origins(number: int) -> list[Held | Size]:
    if not isinstance(number, Number):
        return []
    if isinstance(number.origin, Held | Size):
        return [number.origin]
    return _origins(number.origin.left) + _origins(number.origin.right)


def _classes(ties: Iterable[_Tie]) -> list[set[str]]:
    """Join the groups of ties that share one."""
    classes: list[set[str]] = []
    for tie in ties:
        joined = set(tie.groups)
        apart = []
        for names in classes:
            if names & joined:
                joined |= names
            else:
                apart.append(names)
        classes = [*apart, joined]
    return classes
