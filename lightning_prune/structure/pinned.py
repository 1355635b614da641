"""Channels that cannot be pruned, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.choices import Taken, resolve
from lightning_prune.structure.labels import PINNED, Atoms, Ledger

__all__ = ["Pinned", "find_pinned"]


@dataclass(frozen=True)
class Pinned:
    """Channels that cannot be pruned: ``count`` of the ``size`` along a dimension of a parameter, and why."""

    tensor: str
    dim: int
    size: int
    count: int
    reason: str


def find_pinned(
    ledger: Ledger, taken: Taken, component: Atoms, made: NDArray[np.bool_], lone: Mapping[int, str]
) -> list[Pinned]:
    """Return the channels that cannot be pruned, for every dimension that produces channels.

    Args:
        ledger: The trace.
        taken: The alternative taken of each choice.
        component: Component of every atom.
        made: Which atoms a weight produces.
        lone: Slots that no group has though nothing pins them, with the reason.
    """
    found: list[Pinned] = []
    reason = _Reasons(ledger, taken)
    for slot in ledger.slots:
        if not made[slot.start]:
            continue
        stays = component[slot.start : slot.start + slot.size] == component[PINNED]
        if stays.any():
            why = reason(np.flatnonzero(stays) + slot.start)
            found.append(Pinned(slot.tensor, slot.dim, slot.size, int(stays.sum()), why))
    for which in sorted(lone):
        slot = ledger.slots[which]
        if made[slot.start]:
            found.append(Pinned(slot.tensor, slot.dim, slot.size, slot.size, lone[which]))
    for slot in ledger.slots:
        if slot.dim == 0 and slot.tensor in ledger.idle:
            found.append(Pinned(slot.tensor, slot.dim, slot.size, slot.size, "it never ran on the example inputs"))
    return found


class _Reasons:
    """Returns why atoms are pinned: the first pin on them, or else on those they are tied to."""

    def __init__(self, ledger: Ledger, taken: Taken) -> None:
        self.ledger, self.taken = ledger, taken
        self.own = self._first_of(np.arange(ledger.size))

    def __call__(self, atoms: Atoms) -> str:
        own = self.own[atoms]
        if (own >= 0).any():
            return self.ledger.pins[own[own >= 0][0]][1]
        component, first_pin = self.tied
        tied = first_pin[component[atoms]]
        tied = tied[tied >= 0]
        if not len(tied):
            return "tied to channels that cannot be pruned: entries beside them are padding, constants or pairs of them"
        return f"tied to channels that cannot be pruned: {self.ledger.pins[tied[0]][1]}"

    @cached_property
    def tied(self) -> tuple[Atoms, Atoms]:
        """Components that ignore pins, and the first pin on each of them (-1: none)."""
        component = resolve(self.ledger, self.taken, pinned=False)
        return component, self._first_of(component)

    def _first_of(self, component: Atoms) -> Atoms:
        first = np.full(self.ledger.size, -1)
        for which in reversed(range(len(self.ledger.pins))):  # the earliest pin is written last
            first[component[self.ledger.pins[which][0]]] = which
        return first
