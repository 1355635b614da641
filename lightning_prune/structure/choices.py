"""Connected components of atoms, and the choice between alternative ways to prune channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Ledger

__all__ = ["Taken", "Way", "connected", "resolve", "take"]

Taken = dict[Hashable, Hashable]
"""Choice -> the alternative taken."""
Way = tuple[Hashable, Hashable]
"""A choice, and one of its alternatives."""


def resolve(ledger: Ledger, taken: Taken, pinned: bool = True) -> Atoms:
    """Return the connected component of every atom, given the alternative taken of each choice.

    All pinned atoms form one component. With ``pinned=False``, pins are ignored.
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
    pins = _pins(ledger) if pinned else []
    stays = _beside_ways_not_taken(ledger, active)
    pins.append((stays, np.full(len(stays), PINNED)))
    return connected(ledger.size, [*ledger.pairs, *stands_for, *pins], active, ledger.blocks)


def _pins(ledger: Ledger) -> list[tuple[Atoms, Atoms]]:
    """Return the pairs that connect pinned atoms to the one atom that stands for all of them."""
    return [(labels, np.full(len(labels), PINNED)) for labels, _ in ledger.pins]


def _beside_ways_not_taken(ledger: Ledger, active: NDArray[np.bool_]) -> Atoms:
    """Return atoms tied to channels of an alternative that is not taken: those are kept, so these must be, too."""
    if not ledger.choices or not ledger.together:
        return np.empty(0, dtype=np.int64)
    a, b = (np.concatenate(side) for side in zip(*ledger.together, strict=True))
    inactive = ~active
    inactive[INERT] = False
    return np.concatenate([b[inactive[a] & active[b]], a[inactive[b] & active[a]]])


def connected(
    size: int,
    pairs: Iterable[tuple[Atoms, Atoms]],
    active: NDArray[np.bool_],
    blocks: Mapping[int, Atoms] = MappingProxyType({}),
) -> Atoms:
    """Find connected components, ignoring pairs with an inactive end.

    Args:
        size: Number of atoms.
        pairs: Arrays of atoms that are connected, element by element.
        active: Which atoms exist, ``(size,)``.
        blocks: By ``id``, disjoint arrays of active atoms. Pairs of two blocks, which are most of the pairs in a
            network, are joined without looking at their atoms.

    Returns:
        For each atom the representative of its component, ``(size,)``.
    """
    root = np.arange(size, dtype=np.int64)
    rest = _join_blocks(root, pairs, blocks)
    if not rest:
        return root
    a, b = (np.concatenate(side) for side in zip(*rest, strict=True))
    both = active[a]
    both &= active[b]
    if not both.all():
        a, b = a[both], b[both]
    a, b = root[a], root[b]
    # Invariant: root[x] <= x, so following roots ends, and the smallest atom represents its component.
    while len(a):
        high = np.maximum(a, b)
        np.minimum.at(root, high, np.minimum(a, b))  # hook the larger root onto the smaller
        above = root[high]
        while not np.array_equal(up := root[above], above):  # shorten the paths of the atoms just hooked
            root[high] = above = up
        a, b = root[a], root[b]
        apart = a != b  # pairs that are joined by now are done
        a, b = a[apart], b[apart]
    while not np.array_equal(flat := root[root], root):
        root = flat
    return root


def _join_blocks(
    root: Atoms, pairs: Iterable[tuple[Atoms, Atoms]], blocks: Mapping[int, Atoms]
) -> list[tuple[Atoms, Atoms]]:
    """Point every block to the first one it is connected with, and return the pairs that are not of two blocks."""
    first: dict[int, int] = {}

    def find(block: int) -> int:
        while (above := first.get(block, block)) != block:
            first[block] = block = first.get(above, above)
        return block

    rest = []
    for pair in pairs:
        one, other = id(pair[0]), id(pair[1])
        if one in blocks and other in blocks:
            low, high = find(one), find(other)
            if blocks[high][0] < blocks[low][0]:  # the block of smaller atoms represents both
                low, high = high, low
            first[high] = low
        else:
            rest.append(pair)
    for block in first:
        root[blocks[block]] = blocks[find(block)]
    return rest


def take(ledger: Ledger, last: Container[Way] = ()) -> Taken:
    """Choose one alternative of every choice; alternatives that are tied to each other are chosen together.

    Whole batches of a product (attention heads) are preferred to the same share of each. After that, the alternative
    with the most channels that nothing downstream pins is preferred.

    Args:
        ledger: The trace.
        last: Alternatives to avoid, and with them those tied to them, if there are others.
    """
    ways: list[Way] = []
    for key, choice in ledger.choices.items():
        ways += [(key, alternative) for alternative in choice.alternatives]
    if not ways:
        return {}
    together: dict[int, list[Way]] = defaultdict(list)
    for way, first in zip(ways, _together(ledger, ways), strict=True):
        together[int(first)].append(way)
    rank = _ranking(ledger, last)
    ranked = sorted(together.values(), key=rank, reverse=True)
    taken: Taken = {}
    for tied in ranked:
        keys = {key for key, _ in tied}
        # Two alternatives of one choice that are tied to each other cannot both be taken.
        if len(keys) == len(tied) and not any(key in taken for key in keys):
            taken.update(tied)
    for tied in ranked:  # of the choices that are left, each takes its best alternative alone
        for key, alternative in tied:
            taken.setdefault(key, alternative)
    return taken


def _ranking(ledger: Ledger, last: Container[Way]) -> Callable[[list[Way]], tuple[bool, bool, bool, int, int]]:
    """Return the sort key of alternatives that are tied to each other: higher is preferred."""
    active = np.ones(ledger.size, dtype=bool)
    active[INERT] = False
    root = connected(ledger.size, [*ledger.pairs, *_pins(ledger)], active, ledger.blocks)
    whole = np.zeros(ledger.size, dtype=bool)
    for atoms in ledger.whole:
        whole[atoms] = True

    def rank(tied: list[Way]) -> tuple[bool, bool, bool, int, int]:
        wanted = not any(way in last for way in tied)
        blocks = [ledger.choices[key].alternatives[way][0][0] for key, way in tied]
        free = min(int((root[atoms] != root[PINNED]).sum()) for atoms in blocks)
        preferred = any(bool(whole[atoms].any()) for atoms in blocks)
        return wanted, free > 0, preferred, free, max(map(len, blocks))

    return rank


def _together(ledger: Ledger, ways: Sequence[Way]) -> Atoms:
    """Find alternatives of different choices that are tied: one cannot be taken without the other.

    Returns:
        For each alternative the first of those it is tied to, ``(len(ways),)``.
    """
    # A graph of alternatives, numbered first, and of atoms, numbered behind them.
    owned = []
    for which, (key, way) in enumerate(ways):
        for atoms, _ in ledger.choices[key].alternatives[way]:
            owned.append((np.full(len(atoms), which), len(ways) + atoms))
    met = [(len(ways) + a, len(ways) + b) for a, b in ledger.together]
    size = len(ways) + ledger.size
    return connected(size, [*owned, *met], np.ones(size, dtype=bool))[: len(ways)]
