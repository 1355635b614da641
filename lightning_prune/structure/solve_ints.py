"""Solves for numbers on modules from numbers computed of them, such as 64 from ``split(64 // 2)``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping

from lightning_prune.structure.labels import Attribute, Equation, Ledger
from lightning_prune.structure.traced_ints import Derived, Held, Number, Size, leaves

__all__ = ["Count", "Place", "add_unknowns_", "place_of", "worked_back"]

Place = tuple[str, str, int | None]
"""Path of a module, name of its attribute, and the entry where that is a tuple or list."""
Count = Callable[[Held | Size, int], int]
"""From a number's origin and its old value to its new value."""

# (operator, whether the unknown is its left operand) -> the unknown, from the result, the other operand, its old value
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
    """Add attributes for numbers that no operator takes as they are, but in the form of a result.

    If a module holds 64 and its code splits at ``64 // 2``, the kept entries of the half determine the new number.
    If an equation has several unknown numbers, the largest (a width rather than a number of parts) changes, and the
    others keep their values.
    """
    known = {place_of(attribute) for attribute in ledger.attributes}
    waiting = _unsolved(ledger.equations, known)
    while waiting:  # ends, since each round makes numbers known
        equation, unknown = min(waiting, key=lambda entry: len(entry[1]))
        held = max(unknown, key=unknown.__getitem__)
        known.update(map(place_of, unknown))
        ledger.attributes.append(
            Attribute(held.module, held.name, equation.labels, held.index, equation.where, equation.number)
        )
        waiting = _unsolved([equation for equation, _ in waiting], known)


def worked_back(number: Number, place: Place, result: int, count: Count) -> int:
    """Return the value that a module must hold at ``place`` so that ``number``, computed from it, equals ``result``.

    If no value does, the value returned gives another number, which callers must check.
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
    except ZeroDivisionError:  # the divisor has been pruned to zero
        return int(inner)


def _unsolved(equations: Iterable[Equation], known: Container[Place]) -> list[tuple[Equation, dict[Held, int]]]:
    """Return the equations that have unknown numbers, each with those and their old values."""
    found = []
    for equation in equations:
        unknown = _unknown(equation, known)
        if unknown:
            found.append((equation, unknown))
    return found


def _unknown(equation: Equation, known: Container[Place]) -> dict[Held, int]:
    """Return the unknown numbers of an equation with their old values; none if one occurs twice."""
    unknown: dict[Held, int] = {}
    for held, value in leaves(equation.number):
        if not isinstance(held, Held) or place_of(held) in known:
            continue
        if held in unknown:
            return {}  # no inverse in the table solves for a number on both sides
        unknown[held] = value
    return unknown


def _places(number: int) -> set[Place]:
    return {place_of(origin) for origin, _ in leaves(number) if isinstance(origin, Held)}
