"""Numbers on modules that show only in what code makes of them: finds them and works them back; knows no operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from lightning_prune.structure.labels import Attribute, Equation, Ledger
from lightning_prune.structure.numbers import Derived, Held, Number, Size, origins

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

    Where a module holds 64 and its code splits at ``64 // 2``, whatever is left of the half tells what it must hold. An
    equation with several such numbers tells nothing until others tell of all of these but one.
    """
    known = {place_of(attribute) for attribute in ledger.attributes}
    waiting = list(ledger.equations)
    while found := [(equation, unknown) for equation in waiting if (unknown := _unknown(equation, known)) is not None]:
        for equation, held in found:
            waiting.remove(equation)
            if place_of(held) not in known:
                known.add(place_of(held))
                ledger.attributes.append(
                    Attribute(held.module, held.name, equation.labels, held.index, equation.where, equation.number)
                )


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


def _unknown(equation: Equation, known: Iterable[Place]) -> Held | None:
    """Return the one number of an equation that nothing else tells of."""
    held = [origin for origin in origins(equation.number) if isinstance(origin, Held)]
    open_ = [origin for origin in held if place_of(origin) not in known]
    return open_[0] if len(open_) == 1 else None


def _places(number: int) -> set[Place]:
    return {place_of(origin) for origin in origins(number) if isinstance(origin, Held)}
