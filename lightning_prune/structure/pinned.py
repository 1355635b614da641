"""Which channels stay, and why; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.choices import Taken, resolve
from lightning_prune.structure.labels import PINNED, Atoms, Ledger

__all__ = ["Pinned", "find_pinned"]


@dataclass(frozen=True)
class Pinned:
    """Channels that stay: ``count`` of the ``size`` along a dimension of a parameter, and why."""

    tensor: str
    dim: int
    size: int
    count: int
    reason: str


def find_pinned(
    ledger: Ledger, taken: Taken, component: Atoms, made: NDArray[np.bool_], alone: set[int]
) -> list[Pinned]:
    """Say of every dimension that makes channels which of them stay, and why."""
    reason = _Reasons(ledger, taken)
    return (
        [
            Pinned(slot.tensor, slot.dim, slot.size, int(stays.sum()), reason(np.flatnonzero(stays) + slot.start))
            for slot in ledger.slots
            if made[slot.start] and (stays := component[slot.start : slot.start + slot.size] == component[PINNED]).any()
        ]
        + [
            Pinned(slot.tensor, slot.dim, slot.size, slot.size, "its channels can only leave all together")
            for which in sorted(alone)
            if made[(slot := ledger.slots[which]).start]
        ]
        + [
            Pinned(slot.tensor, slot.dim, slot.size, slot.size, "it never ran on the example inputs")
            for slot in ledger.slots
            if slot.dim == 0 and slot.tensor in ledger.idle
        ]
    )


class _Reasons:
    """Tells why atoms are pinned: the first pin on them, or else on what they are tied to."""

    def __init__(self, ledger: Ledger, taken: Taken) -> None:
        self.ledger, self.taken = ledger, taken
        self.own = self._first_of(np.arange(ledger.size))

    def __call__(self, atoms: Atoms) -> str:
        own = self.own[atoms]
        if (own >= 0).any():
            return self.ledger.pins[own[own >= 0][0]][1]
        component, told = self.tied
        tied = told[component[atoms]]
        because = f": {self.ledger.pins[tied[tied >= 0][0]][1]}" if (tied >= 0).any() else ""
        return f"tied to channels that stay{because}"

    @cached_property
    def tied(self) -> tuple[Atoms, Atoms]:
        """Return what each atom is tied to without pins, and the first pin on each such component."""
        component = resolve(self.ledger, self.taken, pinned=False)
        return component, self._first_of(component)

    def _first_of(self, component: Atoms) -> Atoms:
        told = np.full(self.ledger.size, -1)
        for which in reversed(range(len(self.ledger.pins))):
            told[component[self.ledger.pins[which][0]]] = which
        return told
