"""Numbers on modules that show only in what code makes of them: finds them and works them back; knows no operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping

from lightning_prune.structure.labels import Attribute, Equation, Ledger
from lightning_prune.structure.traced_ints import Derived, Held, Number, Size, leaves

__all__ = ["Count", "Place", "add_unknowns_", "place_of", "worked_back"]

Place = tuple[str, str, int | None]
"""Path of a module, name of its attribute, and the entry where that is a tuple or list."""
Count = Callable[[Held | Size, int], int]
"""Given where a number comes from and what it was, tells what it has become."""

# operator, and whether the unknown stands on its left -> the unknown, given the result, the other side, and what it was
_INVERSES: Mapping[tuple[Callable[[int, int], int], bool], Callable[[int, int, int], int]] = {
    (operator.add, True): lambda result, other, before: result - other,
    (operator.add, False): lambda result, other, before: result - other,
    (operator.sub, True): lambda result, other, before: result + other,
    (operator.sub, False): lambda result, other, before: other - result,
    (operator.mul, True): lambda result, other, before: result // other,
    (operator.mul, False): lambda result, other, before: result // other,
    (operator.floordiv, True): lambda result, other, before: result * other + before % other,
    (operator.floordiv, False): lambda result, other, before: other // result,
}


def place_of(held: Held | Attribute) -> Place:
    """Return where a number is held."""
    return held.module, held.name, held.index


def add_unknowns_(ledger: Ledger) -> None:
    """Let numbers follow that no operator was asked for as they are, but one was for what code made of them.

    Where a module holds 64 and its code splits at ``64 // 2``, whatever is left of the half tells what it must hold.
    Where an equation has several such numbers, and others do not tell of all but one of these, the largest follows, a
    width rather than a number of parts, and the others stay.
    """
    known = {place_of(attribute) for attribute in ledger.attributes}
    waiting = [(equation, unknown) for equation in ledger.equations if (unknown := _unknown(equation, known))]
    while waiting:
        equation, unknown = min(waiting, key=lambda entry: len(entry[1]))
        held = max(unknown, key=unknown.__getitem__)
        known.update(map(place_of, unknown))
        ledger.attributes.append(
            Attribute(held.module, held.name, equation.labels, held.index, equation.where, equation.number)
        )
        waiting = [(equation, left) for equation, _ in waiting if (left := _unknown(equation, known))]


def worked_back(number: Number, place: Place, result: int, count: Count) -> int:
    """Return what a module must hold at ``place`` for a number that code makes of it to be ``result``.

    If nothing makes it so, what is returned makes it something else.
    """
    if not isinstance(number.origin, Derived):
        return result
    sides = (number.origin.left, number.origin.right)
    left = place in _places(sides[0])
    inner, other = sides if left else sides[::-1]
    inverse = _INVERSES.get((number.origin.operator, left))
    if inverse is None or not isinstance(inner, Number):
        return int(inner)
    try:
        known = other.evaluate(count) if isinstance(other, Number) else other
        return worked_back(inner, place, inverse(result, known, int(inner)), count)
    except ZeroDivisionError:  # nothing is left of what is divided by
        return int(inner)


def _unknown(equation: Equation, known: Container[Place]) -> dict[Held, int]:
    """Return the numbers of an equation that nothing else tells of, and what they are; none if one is in it twice."""
    found = [(held, value) for held, value in leaves(equation.number) if isinstance(held, Held)]
    unknown = [(held, value) for held, value in found if place_of(held) not in known]
    return dict(unknown) if len(dict(unknown)) == len(unknown) else {}


def _places(number: int) -> set[Place]:
    return {place_of(origin) for origin, _ in leaves(number) if isinstance(origin, Held)}
