"""Which way is taken where channels can leave in several, and which atoms then go together; knows no channel group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Ledger

__all__ = ["Taken", "Way", "connected", "resolve", "take"]

Taken = dict[Hashable, Hashable]
"""Choice -> the way that is taken."""
Way = tuple[Hashable, Hashable]
"""A choice, and one of its ways."""


def resolve(ledger: Ledger, taken: Taken, pinned: bool = True) -> Atoms:
    """Find the connected component of every atom, given the alternative taken of each choice.

    All that is pinned is one component; unless ``pinned``, pins do not count.
    """
    active = np.ones(ledger.size, dtype=bool)
    active[INERT] = False
    stands_for = []
    for key, choice in ledger.choices.items():
        way = taken.get(key, next(iter(choice.alternatives)))
        for name, blocks in choice.alternatives.items():
            for atoms, columns in blocks:
                if name == way:
                    active[atoms] = active[columns].any(axis=0)
                    stands_for.append((np.broadcast_to(atoms, columns.shape).ravel(), columns.ravel()))
                else:
                    active[atoms] = False
    pins = [(labels, np.full(len(labels), PINNED)) for labels, _ in ledger.pins if pinned]
    stays = _beside_ways_not_taken(ledger, active)
    return connected(ledger.size, [*ledger.pairs, *stands_for, *pins, (stays, np.full(len(stays), PINNED))], active)


def _beside_ways_not_taken(ledger: Ledger, active: NDArray[np.bool_]) -> Atoms:
    """Find what alone met channels that could leave in a way that is not taken: those stay, and so must it."""
    if not ledger.choices or not ledger.together:
        return np.empty(0, dtype=np.int64)
    a, b = (np.concatenate(side) for side in zip(*ledger.together, strict=True))
    gone = ~active
    gone[INERT] = False
    return np.concatenate([b[gone[a] & active[b]], a[gone[b] & active[a]]])


def connected(size: int, pairs: Iterable[tuple[Atoms, Atoms]], active: NDArray[np.bool_]) -> Atoms:
    """Find connected components; pairs with an inactive end do not count.

    Returns:
        For each atom the smallest atom of its component, ``(size,)``.
    """
    pairs = list(pairs)
    root = np.arange(size, dtype=np.int64)
    if not pairs:
        return root
    a = np.concatenate([pair[0] for pair in pairs])
    b = np.concatenate([pair[1] for pair in pairs])
    both = active[a] & active[b] & (a != b)
    a, b = a[both], b[both]
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)  # hook the larger root onto the smaller
        while not np.array_equal(flat := root[root], root):
            root = flat
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
    return root


def take(ledger: Ledger, last: Container[Way] = ()) -> Taken:
    """Take one alternative of every choice, those that met together.

    Whole ones of what a product runs over in batches (heads) come before a share of each; then comes what has the most
    channels that nothing downstream pins.

    Args:
        ledger: What the trace wrote down.
        last: Ways to take only where there is no other, and what goes with them.
    """
    ways = [(key, way) for key, choice in ledger.choices.items() for way in choice.alternatives]
    if not ways:
        return {}
    pins = [(labels, np.full(len(labels), PINNED)) for labels, _ in ledger.pins]
    active = np.ones(ledger.size, dtype=bool)
    active[INERT] = False
    root = connected(ledger.size, [*ledger.pairs, *pins], active)
    whole = np.zeros(ledger.size, dtype=bool)
    for atoms in ledger.whole:
        whole[atoms] = True
    blocks = [ledger.choices[key].alternatives[way][0][0] for key, way in ways]
    together: dict[int, list[int]] = defaultdict(list)
    for which, first in enumerate(_together(ledger, ways)):
        together[int(first)].append(which)

    def rank(members: list[int]) -> tuple[bool, bool, bool, int, int]:
        wanted = not any(ways[which] in last for which in members)
        free = min(int((root[blocks[which]] != root[PINNED]).sum()) for which in members)
        preferred = any(bool(whole[blocks[which]].any()) for which in members)
        return wanted, free > 0, preferred, free, max(len(blocks[which]) for which in members)

    taken: Taken = {}
    for members in sorted(together.values(), key=rank, reverse=True):
        keys = {ways[which][0] for which in members}
        if len(keys) == len(members) and not any(key in taken for key in keys):
            taken.update(ways[which] for which in members)
    for members in sorted(together.values(), key=rank, reverse=True):  # what met cannot be had together
        for which in members:
            taken.setdefault(*ways[which])
    return taken


def _together(ledger: Ledger, ways: Sequence[Way]) -> Atoms:
    """Find which alternatives of different choices met: one cannot be taken without the other.

    Returns:
        For each alternative the first of those it belongs to, ``(len(ways),)``.
    """
    owned = [
        (np.full(len(atoms), which), len(ways) + atoms)
        for which, (key, way) in enumerate(ways)
        for atoms, _ in ledger.choices[key].alternatives[way]
    ]
    met = [(len(ways) + a, len(ways) + b) for a, b in ledger.together]
    size = len(ways) + ledger.size
    return connected(size, [*owned, *met], np.ones(size, dtype=bool))[: len(ways)]
