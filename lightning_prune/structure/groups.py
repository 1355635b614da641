"""From what met to what can leave: connected atoms become units, alike units become channel groups; changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Ledger, SlotRange
from lightning_prune.structure.links import find_links, left

__all__ = ["ChannelGroup", "Keep", "Pinned", "Slot", "Structure", "connected", "find_structure"]

Keep = Mapping[str, NDArray[np.bool_]]
"""Group name -> for each of its units whether it stays, ``(width,)``."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a channel group lives: one dimension of one parameter or buffer.

    Attributes:
        tensor: Name of the parameter or buffer.
        dim: Its dimension.
        units: For each index along the dimension the unit it belongs to, or -1, ``(size,)``.
        role: ``"producer"`` where a weight makes the channels, ``"consumer"`` where it sums over them, or
            ``"follower"``.
    """

    tensor: str
    dim: int
    units: NDArray[np.int64]
    role: Literal["producer", "consumer", "follower"]

    @cached_property
    def aligned(self) -> bool:
        """Whether index and unit are the same number everywhere."""
        return bool((self.units == np.arange(len(self.units))).all())


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """All units of one kind.

    Attributes:
        name: Path of the first module that produces the channels.
        width: Number of units.
        slots: Every place where entries of these units live.
        changes_statistics: Whether a normalisation, softmax or other statistic runs across the units, so that numbers
            change, rightly, when some of them leave.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    changes_statistics: bool

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the modules (or names of bare parameters) that produce the channels, in the order they run."""
        made = [slot for slot in self.slots if slot.role == "producer"] or list(self.slots)
        return tuple(dict.fromkeys(_owner(slot.tensor) for slot in made))


@dataclass(frozen=True)
class Pinned:
    """Channels that stay: ``count`` of the ``size`` along a dimension of a parameter, and why."""

    tensor: str
    dim: int
    size: int
    count: int
    reason: str


@dataclass(eq=False)
class Structure:
    """What a trace found: the channel groups of a model, what is pinned, and what everything costs."""

    groups: dict[str, ChannelGroup]
    pinned: list[Pinned]
    ledger: Ledger
    taken: dict[Hashable, Hashable]
    component: Atoms
    units: dict[str, Atoms] = field(default_factory=dict)
    """Group name -> component of each of its units, ``(width,)``."""
    links: tuple[tuple[str, ...], ...] = ()
    """Groups that must keep the same share, since a number in the code ties their widths together."""

    @property
    def branching(self) -> tuple[str, ...]:
        """Paths of the modules whose code goes by numbers of its input: of them only the path taken was seen."""
        return tuple(path or "the model" for path in dict.fromkeys(self.ledger.decided))

    def alive(self, keep: Keep) -> NDArray[np.bool_]:
        """Return for every atom whether it is left once the units that ``keep`` gives up have gone, ``(atoms,)``."""
        left = np.ones(self.ledger.size, dtype=bool)
        for name, kept in keep.items():
            left[self.units[name][~kept]] = False
        return left[self.component]

    def flops(self, keep: Keep) -> int:
        """Predict the multiply-adds of the model once cut, by fvcore's convention."""
        alive = self.alive(keep)
        return round(sum(self.costs_by_operator(alive).values()))

    def costs_by_operator(self, alive: NDArray[np.bool_]) -> dict[str, float]:
        """Predict multiply-adds by kind of operator, given which atoms are left."""
        total: dict[str, float] = defaultdict(float)
        counts: dict[tuple[int, ...], int] = {}
        for cost in self.ledger.costs:
            product = cost.factor
            for labels in cost.sizes:
                key = tuple(id(label.atoms) for label in labels)
                if key not in counts:
                    counts[key] = left(labels, alive)
                product *= counts[key]
            total[cost.operator] += product
        return total

    def without(self, names: Iterable[str], reason: str) -> Structure:
        """Return the structure with some groups pinned, and the groups linked to them."""
        return self.without_each(dict.fromkeys(names, reason))

    def without_each(self, why: Mapping[str, str]) -> Structure:
        """Return the structure with some groups pinned, each for a reason of its own, and the groups linked to them."""
        if not why:
            return self
        reasons = dict(why)
        for link in self.links:
            stays = sorted(why.keys() & set(link))
            for name in link if stays else ():
                told = f"its width is tied to that of {', '.join(stays)}, which stays: {why[stays[0]]}"
                reasons.setdefault(name, told)
        pins = [
            Pinned(slot.tensor, slot.dim, len(slot.units), int((slot.units >= 0).sum()), reasons[name])
            for name in self.groups
            if name in reasons
            for slot in self.groups[name].slots
            if slot.role == "producer"
        ]
        groups = {name: group for name, group in self.groups.items() if name not in reasons}
        units = {name: unit for name, unit in self.units.items() if name not in reasons}
        links = tuple(link for link in self.links if not reasons.keys() & set(link))
        return Structure(groups, [*self.pinned, *pins], self.ledger, self.taken, self.component, units, links)


def find_structure(ledger: Ledger) -> Structure:
    """Turn what met during a trace into channel groups."""
    taken = _take(ledger)
    component = resolve(ledger, taken)
    pinned = component == component[PINNED]
    atoms, slot_of = _real_atoms(ledger.slots)
    free = ~pinned[atoms]
    atoms, slot_of = atoms[free], slot_of[free]
    units = component[atoms]

    # units whose entries lie in the same slots, equally often, are of one kind
    weights = np.random.default_rng(0).integers(1, 2**62, size=len(ledger.slots), dtype=np.uint64)
    signature = np.zeros(ledger.size, dtype=np.uint64)
    np.add.at(signature, units, weights[slot_of])
    roles = _roles(ledger)
    mixed = np.zeros(ledger.size, dtype=bool)
    for labels in ledger.statistics:
        mixed[component[labels]] = True

    groups: dict[str, ChannelGroup] = {}
    members: dict[str, Atoms] = {}
    alone: list[int] = []
    order = np.argsort(signature[units], kind="stable")
    by_kind = sorted(_runs(order, signature[units[order]]), key=lambda rows: int(rows[0])) if len(order) else []
    place = np.empty(ledger.size, dtype=np.int64)  # of each unit within its group
    for rows in by_kind:
        if not roles["producer"][atoms[rows]].any():
            continue  # no operator makes them: they lie unused, or are numbers of the model's own
        by_slot = _runs(rows, slot_of[rows])  # rows keep the order of slots
        found = np.unique(units[by_slot[0]])  # every slot holds all units
        if len(found) < 2:
            alone.extend(int(slot_of[part[0]]) for part in by_slot)
            continue
        place[found] = np.arange(len(found))
        slots = _slots([ledger.slots[slot_of[part[0]]] for part in by_slot], by_slot, place, units, atoms, roles)
        group = ChannelGroup(_name(slots, groups), len(found), slots, bool(mixed[found].any()))
        groups[group.name] = group
        members[group.name] = found
    links, stuck = find_links(ledger, component, members)
    pinned_ = _pinned(ledger, component, roles["producer"], set(alone))
    return Structure(groups, pinned_, ledger, taken, component, members, tuple(links)).without_each(stuck)


def resolve(ledger: Ledger, taken: Mapping[Hashable, Hashable]) -> Atoms:
    """Find the connected component of every atom, given the alternative taken of each choice."""
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
    pins = [(labels, np.full(len(labels), PINNED)) for labels, _ in ledger.pins]
    return connected(ledger.size, [*ledger.pairs, *stands_for, *pins], active, ledger.blocks)


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


def _take(ledger: Ledger) -> dict[Hashable, Hashable]:
    """Take one alternative of every choice, those that met together.

    Whole ones of what a product runs over in batches (heads) come before a share of each; then comes what has the most
    channels that nothing downstream pins.
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

    def rank(members: list[int]) -> tuple[bool, bool, int, int]:
        free = min(int((root[blocks[which]] != root[PINNED]).sum()) for which in members)
        preferred = any(bool(whole[blocks[which]].any()) for which in members)
        return free > 0, preferred, free, max(len(blocks[which]) for which in members)

    taken: dict[Hashable, Hashable] = {}
    for members in sorted(together.values(), key=rank, reverse=True):
        keys = {ways[which][0] for which in members}
        if len(keys) == len(members) and not any(key in taken for key in keys):
            taken.update(ways[which] for which in members)
    for members in sorted(together.values(), key=rank, reverse=True):  # what met cannot be had together
        for which in members:
            taken.setdefault(*ways[which])
    return taken


def _together(ledger: Ledger, ways: Sequence[tuple[Hashable, Hashable]]) -> Atoms:
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


def _real_atoms(slots: list[SlotRange]) -> tuple[Atoms, Atoms]:
    if not slots:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    starts, sizes = np.array([(slot.start, slot.size) for slot in slots]).T
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes), np.repeat(np.arange(len(slots)), sizes)


def _roles(ledger: Ledger) -> dict[str, NDArray[np.bool_]]:
    roles: dict[str, NDArray[np.bool_]] = {}
    for role, labels in ledger.roles.items():
        roles[role] = np.zeros(ledger.size, dtype=bool)
        if labels:
            roles[role][np.concatenate(labels)] = True
    return roles


def _runs(rows: Atoms, values: NDArray[Any]) -> list[Atoms]:
    """Cut rows where their value changes."""
    bounds = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(rows)]
    return [rows[start:stop] for start, stop in pairwise(bounds)]


def _slots(
    ranges: list[SlotRange],
    rows: list[Atoms],
    place: Atoms,
    units: Atoms,
    atoms: Atoms,
    roles: Mapping[str, NDArray[np.bool_]],
) -> tuple[Slot, ...]:
    """Make the slots of a group; most hold its units in the same order, and share one array."""
    slots: list[Slot] = []
    for along, own in zip(ranges, rows, strict=True):
        index, at = place[units[own]], atoms[own]
        if len(at) < along.size:
            sparse = np.full(along.size, -1, dtype=np.int64)
            sparse[at - along.start] = index
            index = sparse
        if slots and np.array_equal(slots[0].units, index):
            index = slots[0].units
        role: Literal["producer", "consumer", "follower"] = (
            "consumer" if roles["consumer"][at[0]] else "producer" if roles["producer"][at[0]] else "follower"
        )
        slots.append(Slot(along.tensor, along.dim, index, role))
    return tuple(slots)


def _name(slots: tuple[Slot, ...], taken: Mapping[str, ChannelGroup]) -> str:
    name = _owner(next((slot.tensor for slot in slots if slot.role == "producer"), slots[0].tensor))
    if name not in taken:
        return name
    return next(f"{name}#{i}" for i in range(2, len(taken) + 3) if f"{name}#{i}" not in taken)


def _owner(tensor: str) -> str:
    """Return the path of the module that a parameter belongs to, or the name of a parameter of the model itself."""
    module, _, leaf = tensor.rpartition(".")
    return module if leaf in ("weight", "bias") and module else tensor


def _pinned(ledger: Ledger, component: Atoms, made: NDArray[np.bool_], alone: set[int]) -> list[Pinned]:
    """Say of every dimension that makes channels which of them stay, and why."""
    told = np.full(ledger.size, -1)  # the first pin of each atom
    for which in reversed(range(len(ledger.pins))):
        told[ledger.pins[which][0]] = which
    return (
        [
            Pinned(slot.tensor, slot.dim, slot.size, int(stays.sum()), _reason(ledger, told, slot, stays))
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


def _reason(ledger: Ledger, told: Atoms, slot: SlotRange, stays: NDArray[np.bool_]) -> str:
    own = told[slot.start : slot.start + slot.size][stays]
    first = own[own >= 0][:1]
    return ledger.pins[first[0]][1] if len(first) else "tied to channels that stay"
