"""Channel groups: connected atoms form units, and units of one kind form a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.model.calls import uncollected
from lightning_prune.structure.choices import Taken, Way, resolve, take
from lightning_prune.structure.labels import PINNED, Atoms, Ledger, Role, SlotRange
from lightning_prune.structure.pinned import Pinned, find_pinned
from lightning_prune.structure.width_ties import find_links, left

__all__ = ["ChannelGroup", "Keep", "Slot", "Structure", "find_structure"]

_UNREAD = "nothing that ran reads its channels, and other code may"
Keep = Mapping[str, NDArray[np.bool_]]
"""Group name -> for each of its units whether it is kept, ``(width,)``."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One dimension of one parameter or buffer that a channel group extends along.

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
    def held(self) -> int:
        """How many indices along the dimension belong to units."""
        return int(np.count_nonzero(self.units >= 0))

    @cached_property
    def aligned(self) -> bool:
        """Whether index and unit are the same number everywhere."""
        return bool((self.units == np.arange(len(self.units))).all())


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units of one kind, any of which can be pruned.

    Attributes:
        name: Path of the first module that produces the channels.
        width: Number of units.
        slots: Every tensor dimension with entries of these units.
        changes_statistics: Whether a normalisation, softmax or other statistic runs over the units, so that pruning
            some of them rightly changes the others' values.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    changes_statistics: bool

    @cached_property
    def channels(self) -> int:
        """How many channels one unit is, at each of the weights that make or read them: 1, or a head's width.

        Weights may hold a unit differently often, as one weight of queries, keys and values does that holds each head
        three times: the largest number of channels counts of which all of them hold a multiple.

        Examples:
            >>> from lightning_prune.structure import find_structure, trace
            >>> import torch
            >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64)
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 32), layer, torch.nn.Linear(32, 2))
            >>> groups = find_structure(trace(net, torch.ones(3, 1, 2))).groups
            >>> {name: group.channels for name, group in groups.items()}
            {'0': 1, '1.self_attn.in_proj_weight': 8, '1.linear1': 1}
        """
        held = {id(slot.units): slot for slot in self.slots if slot.role != "follower"}  # most share one array
        return max(1, math.gcd(*[slot.held // self.width for slot in held.values()]))

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the modules (or names of bare parameters) that produce the channels, in the order they run."""
        made = [slot for slot in self.slots if slot.role == "producer"] or list(self.slots)
        return tuple(dict.fromkeys(_owner(slot.tensor) for slot in made))


@dataclass(eq=False)
class Structure:
    """The result of a trace: channel groups of a model, channels that cannot be pruned, and the cost of operators."""

    groups: dict[str, ChannelGroup]
    pinned: list[Pinned]
    ledger: Ledger
    taken: Taken
    component: Atoms
    units: dict[str, Atoms] = field(default_factory=dict)
    """Group name -> component of each of its units, ``(width,)``."""
    links: tuple[tuple[str, ...], ...] = ()
    """Groups that must keep the same fraction, because numbers in the code tie their widths to each other."""
    _last: tuple[dict[str, bytes], NDArray[np.bool_]] | None = field(default=None, init=False, repr=False)

    @property
    def branching(self) -> tuple[str, ...]:
        """Paths of the modules whose code branches on values of its input: only the branch taken was traced."""
        return tuple(path or "the model" for path in dict.fromkeys(self.ledger.decided))

    def alive(self, keep: Keep) -> NDArray[np.bool_]:
        """Return for every atom whether it is kept, ``(atoms,)``, not to be written to."""
        asked = {name: kept.tobytes() for name, kept in keep.items()}
        if self._last is None or self._last[0] != asked:  # a cut that is planned, verified and made asks six times
            left = np.ones(self.ledger.size, dtype=bool)
            for name, kept in keep.items():
                left[self.units[name][~kept]] = False
            alive = left[self.component]
            alive.flags.writeable = False
            self._last = asked, alive
        return self._last[1]

    def flops(self, keep: Keep) -> int:
        """Return the multiply-adds of the model after pruning, by fvcore's convention."""
        return sum(self.multiply_adds(keep))

    def multiply_adds(self, keep: Keep) -> list[int]:
        """Return the multiply-adds of the model after pruning, one number for each of ``ledger.costs``."""
        alive = self.alive(keep) if keep else None
        counts: dict[tuple[int, ...], int] = {}  # many operators share labels, which are counted once
        found = []
        for cost in self.ledger.costs:
            product = cost.factor
            for labels in cost.sizes:
                key = tuple([id(label.atoms) for label in labels])
                if key not in counts:
                    counts[key] = len(labels[0].atoms) if alive is None else left(labels, alive)
                product *= counts[key]
            found.append(product)
        return found

    def linked(self, sets: Iterable[Iterable[str]]) -> Structure:
        """Return the structure with the groups of each set linked, and with what they are linked to."""
        joined: list[set[str]] = [set(link) for link in self.links]
        for names in sets:
            together = set(names)
            apart = []
            for other in joined:
                if other & together:
                    together |= other
                else:
                    apart.append(other)
            joined = [*apart, together] if len(together) > 1 else joined
        links = [tuple(name for name in self.groups if name in names) for names in joined]
        return replace(self, links=tuple(links))

    def without(self, names: Iterable[str], reason: str) -> Structure:
        """Return the structure with some groups pinned, and the groups linked to them."""
        return self.without_each(dict.fromkeys(names, reason))

    def without_each(self, why: Mapping[str, str]) -> Structure:
        """Return the structure with some groups pinned, each for its own reason, and the groups linked to them."""
        if not why:
            return self
        reasons = dict(why)
        for link in self.links:
            stays = sorted(why.keys() & set(link))
            if not stays:
                continue
            reason = f"its width is tied to that of {', '.join(stays)}, which cannot be pruned: {why[stays[0]]}"
            for name in link:
                reasons.setdefault(name, reason)
        pinned = list(self.pinned)
        for name, group in self.groups.items():
            if name not in reasons:
                continue
            for slot in group.slots:
                if slot.role == "producer":
                    count = int((slot.units >= 0).sum())
                    pinned.append(Pinned(slot.tensor, slot.dim, len(slot.units), count, reasons[name]))
        groups = {name: group for name, group in self.groups.items() if name not in reasons}
        units = {name: unit for name, unit in self.units.items() if name not in reasons}
        links = tuple(link for link in self.links if not reasons.keys() & set(link))
        return Structure(groups, pinned, self.ledger, self.taken, self.component, units, links)


@uncollected()
def find_structure(ledger: Ledger) -> Structure:
    """Return the channel groups of a trace.

    Where channels can be pruned in alternative ways (whole attention heads, or the same share of each), and numbers in
    the code rule out the preferred one, the others are tried. The result with the most prunable channels is returned.
    """
    whole, stuck = _structured(ledger, take(ledger))
    best = whole.without_each(stuck)
    if dead := _dead_ways(whole):
        other, held = _structured(ledger, take(ledger, dead))
        best = max(best, other.without_each(held), key=_count_free)
    last = _ways(whole, stuck)
    while last:  # ends, since ``last`` becomes smaller each time
        whole, stuck = _structured(ledger, take(ledger, last))
        best = max(best, whole.without_each(stuck), key=_count_free)
        again = {choice for choice, _ in _ways(whole, stuck)}
        fewer = {way for way in last if way[0] not in again}  # where no alternative helps, return to the preferred one
        last = fewer if len(fewer) < len(last) else set()
    return best


def _ways(structure: Structure, names: Iterable[str]) -> set[Way]:
    """Return the alternatives taken that hold units of some groups."""
    units = np.zeros(structure.ledger.size, dtype=bool)
    for name in names:
        units[structure.units[name]] = True
    return {way for way in structure.taken.items() if _holds_any(structure, way, units)}


def _dead_ways(structure: Structure) -> set[Way]:
    """Return the alternatives taken by which nothing can be pruned; another alternative may do better."""
    prunable = np.zeros(structure.ledger.size, dtype=bool)
    for units in structure.units.values():
        prunable[units] = True
    return {way for way in structure.taken.items() if not _holds_any(structure, way, prunable)}


def _holds_any(structure: Structure, way: Way, units: NDArray[np.bool_]) -> bool:
    """Return whether any atom of an alternative belongs to one of the units, ``(atoms,)`` by component."""
    choice, alternative = way
    blocks = structure.ledger.choices[choice].alternatives[alternative]
    return any(units[structure.component[atoms]].any() for atoms, _ in blocks)


def _count_free(structure: Structure) -> int:
    """Count the indices of parameters and buffers that can be pruned."""
    count = 0
    for group in structure.groups.values():
        count += sum(slot.held for slot in group.slots)
    return count


def _structured(ledger: Ledger, taken: Taken) -> tuple[Structure, dict[str, str]]:
    """Return the channel groups, and the names of those that numbers in the code fix, each with the reason."""
    component = resolve(ledger, taken)
    atoms, slot_of = _real_atoms(ledger.slots)
    free = component[atoms] != component[PINNED]
    atoms, slot_of = atoms[free], slot_of[free]
    units = component[atoms]
    roles = _roles(ledger)
    mixed = np.zeros(ledger.size, dtype=bool)
    for labels in ledger.statistics:
        mixed[component[labels]] = True

    read = _read(ledger, component)
    groups: dict[str, ChannelGroup] = {}
    members: dict[str, Atoms] = {}
    alone: list[int] = []
    unread: list[int] = []
    place = np.empty(ledger.size, dtype=np.int64)  # of each unit within its group
    for rows in _rows_by_kind(ledger, units, slot_of):
        if not roles["producer"][atoms[rows]].any():
            continue  # no operator produces them: unused parameters, or constants of the model
        by_slot = _runs(rows, slot_of[rows])  # rows keep the order of slots
        found = np.unique(units[by_slot[0]])  # every slot holds all units
        if len(found) < 2:
            alone.extend(int(slot_of[part[0]]) for part in by_slot)
            continue
        if not read[found].any():
            unread.extend(int(slot_of[part[0]]) for part in by_slot)
            continue
        place[found] = np.arange(len(found))
        slots = _slots([ledger.slots[slot_of[part[0]]] for part in by_slot], by_slot, place, units, atoms, roles)
        group = ChannelGroup(_name(slots, groups), len(found), slots, bool(mixed[found].any()))
        groups[group.name] = group
        members[group.name] = found
    links, stuck = find_links(ledger, component, members)
    lone = dict.fromkeys(alone, "all its channels form a single unit") | dict.fromkeys(unread, _UNREAD)
    pinned_ = find_pinned(ledger, taken, component, roles["producer"], lone)
    return Structure(groups, pinned_, ledger, taken, component, members, tuple(links)), stuck


def _read(ledger: Ledger, component: Atoms) -> NDArray[np.bool_]:
    """Return for every component whether anything that ran reads it, ``(atoms,)``.

    Code that goes by numbers of its input may return, on other inputs, what it took a statistic of here.
    """
    roles: tuple[Role, ...] = ("consumer", "contracted") if ledger.decided else ("consumer", "contracted", "reduced")
    found = np.zeros(ledger.size, dtype=bool)
    for role in roles:
        for atoms in ledger.roles[role]:
            found[component[atoms]] = True
    return found


def _rows_by_kind(ledger: Ledger, units: Atoms, slot_of: Atoms) -> list[Atoms]:
    """Group rows (an atom and its slot) by the kind of their unit, in the order of the first row of each kind.

    Units with entries in the same slots, equally often, are of one kind. A unit's kind is identified by the sum of a
    random 62-bit number per slot over its entries, which is the same for other units only by a negligible chance.
    """
    if not len(units):
        return []
    numbers = np.random.default_rng(0).integers(1, 2**62, size=len(ledger.slots), dtype=np.uint64)
    kind = np.zeros(ledger.size, dtype=np.uint64)
    np.add.at(kind, units, numbers[slot_of])
    kinds = kind[units]
    # Rows beside each other are most often of one kind, so that runs of rows are sorted, and not the rows.
    starts = np.concatenate([[0], np.flatnonzero(kinds[1:] != kinds[:-1]) + 1])
    runs = np.argsort(kinds[starts], kind="stable")
    lengths = np.diff(starts, append=len(kinds))[runs]
    before = np.cumsum(lengths) - lengths
    order = np.arange(len(kinds)) + np.repeat(starts[runs] - before, lengths)
    return sorted(_runs(order, kinds[order]), key=lambda rows: int(rows[0]))


def _real_atoms(slots: list[SlotRange]) -> tuple[Atoms, Atoms]:
    """Return the atoms of all slots, one after another, and the slot of each."""
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
    """Split rows where their value changes."""
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
    """Return the slots of a group; those that hold its units in the same order share one array."""
    slots: list[Slot] = []
    first = b""
    consumers, producers = roles["consumer"], roles["producer"]
    for along, own in zip(ranges, rows, strict=True):
        index, at = place[units[own]], atoms[own]
        if len(at) < along.size:  # the other indices are pinned or belong to other groups
            sparse = np.full(along.size, -1, dtype=np.int64)
            sparse[at - along.start] = index
            index = sparse
        same = index.tobytes()
        if not slots:
            first = same
        elif same == first:
            index = slots[0].units
        role: Literal["producer", "consumer", "follower"] = "follower"
        if consumers[at[0]]:
            role = "consumer"
        elif producers[at[0]]:
            role = "producer"
        slots.append(Slot(along.tensor, along.dim, index, role))
    return tuple(slots)


def _name(slots: tuple[Slot, ...], taken: Mapping[str, ChannelGroup]) -> str:
    name = _owner(next((slot.tensor for slot in slots if slot.role == "producer"), slots[0].tensor))
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    return unique


def _owner(tensor: str) -> str:
    """Return the path of the module that a parameter belongs to, or the name of a parameter of the model itself."""
    module, _, leaf = tensor.rpartition(".")
    return module if leaf in ("weight", "bias") and module else tensor
