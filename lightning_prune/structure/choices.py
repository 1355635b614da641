"""Which way is taken where channels can leave in several, and which atoms then go together; knows no channel group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType

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
    return connected(
        ledger.size, [*ledger.pairs, *stands_for, *pins, (stays, np.full(len(stays), PINNED))], active, ledger.blocks
    )


def _beside_ways_not_taken(ledger: Ledger, active: NDArray[np.bool_]) -> Atoms:
    """Find what alone met channels that could leave in a way that is not taken: those stay, and so must it."""
    if not ledger.choices or not ledger.together:
        return np.empty(0, dtype=np.int64)
    a, b = (np.concatenate(side) for side in zip(*ledger.together, strict=True))
    gone = ~active
    gone[INERT] = False
    return np.concatenate([b[gone[a] & active[b]], a[gone[b] & active[a]]])


def connected(
    size: int,
    pairs: Iterable[tuple[Atoms, Atoms]],
    active: NDArray[np.bool_],
    blocks: Mapping[int, Atoms] = MappingProxyType({}),
) -> Atoms:
    """Find connected components; pairs with an inactive end do not count.

    Args:
        size: Number of atoms.
        pairs: Arrays of atoms that meet, one by one.
        active: Which atoms there are, ``(size,)``.
        blocks: By ``id``, arrays that have no atom in common, all of them active. Where two such meet, which is most of
            what happens in a network, their atoms need not be looked at.

    Returns:
        For each atom one that stands for its component, ``(size,)``: of those of the first block the smallest.
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
    while len(a):
        high = np.maximum(a, b)
        np.minimum.at(root, high, np.minimum(a, b))  # hook the larger root onto the smaller
        above = root[high]
        while not np.array_equal(up := root[above], above):
            root[high] = above = up
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    while not np.array_equal(flat := root[root], root):
        root = flat
    return root


def _join_blocks(
    root: Atoms, pairs: Iterable[tuple[Atoms, Atoms]], blocks: Mapping[int, Atoms]
) -> list[tuple[Atoms, Atoms]]:
    """Let every block that met others point to the first of them, and return the pairs that are none of two blocks."""
    first: dict[int, int] = {}

    def find(block: int) -> int:
        while (above := first.get(block, block)) != block:
            first[block] = block = first.get(above, above)
        return block

    rest = []
    for pair in pairs:
        one, other = id(pair[0]), id(pair[1])
        if one in blocks and other in blocks:
            low, high = sorted((find(one), find(other)), key=lambda block: int(blocks[block][0]))
            first[high] = low
        else:
            rest.append(pair)
    for block in first:
        root[blocks[block]] = blocks[find(block)]
    return rest


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
    root = connected(ledger.size, [*ledger.pairs, *pins], active, ledger.blocks)
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
