"""From what met to what can leave: connected atoms become units, alike units become channel groups; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.structure.choices import Taken, Way, resolve, take
from lightning_prune.structure.labels import PINNED, Atoms, Ledger, SlotRange
from lightning_prune.structure.pinned import Pinned, find_pinned
from lightning_prune.structure.width_ties import find_links, left

__all__ = ["ChannelGroup", "Keep", "Slot", "Structure", "find_structure"]

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


@dataclass(eq=False)
class Structure:
    """What a trace found: the channel groups of a model, what is pinned, and what everything costs."""

    groups: dict[str, ChannelGroup]
    pinned: list[Pinned]
    ledger: Ledger
    taken: Taken
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
        return sum(self.multiply_adds(keep))

    def multiply_adds(self, keep: Keep) -> list[int]:
        """Predict the multiply-adds of the model once cut, one number for each of ``ledger.costs``."""
        alive = self.alive(keep)
        counts: dict[tuple[int, ...], int] = {}
        found = []
        for cost in self.ledger.costs:
            product = cost.factor
            for labels in cost.sizes:
                key = tuple([id(label.atoms) for label in labels])
                if key not in counts:
                    counts[key] = left(labels, alive)
                product *= counts[key]
            found.append(product)
        return found

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
    """Turn what met during a trace into channel groups.

    Where channels can leave in several ways, and those of the one taken cannot for what the code asks, the others are
    tried; what frees the most channels counts.
    """
    whole, stuck = _structured(ledger, take(ledger))
    best, last = whole.without_each(stuck), _ways(whole, stuck)
    if dead := _dead_ways(whole):
        other, held = _structured(ledger, take(ledger, dead))
        best = max(best, other.without_each(held), key=_count_free)
    while last:
        whole, stuck = _structured(ledger, take(ledger, last))
        best = max(best, whole.without_each(stuck), key=_count_free)
        again = {choice for choice, _ in _ways(whole, stuck)}
        fewer = {way for way in last if way[0] not in again}  # those whose other ways do not help, either, go back
        last = fewer if len(fewer) < len(last) else set()
    return best


def _ways(structure: Structure, names: Iterable[str]) -> set[Way]:
    """Return the ways taken on which groups hang."""
    hang = np.zeros(structure.ledger.size, dtype=bool)
    for name in names:
        hang[structure.units[name]] = True
    alternatives = {choice: found.alternatives for choice, found in structure.ledger.choices.items()}
    return {
        (choice, way)
        for choice, way in structure.taken.items()
        if any(hang[structure.component[atoms]].any() for atoms, _ in alternatives[choice][way])
    }


def _dead_ways(structure: Structure) -> set[Way]:
    """Return the ways taken that let nothing leave: another may."""
    live = np.zeros(structure.ledger.size, dtype=bool)
    for units in structure.units.values():
        live[units] = True
    alternatives = {choice: found.alternatives for choice, found in structure.ledger.choices.items()}
    return {
        (choice, way)
        for choice, way in structure.taken.items()
        if not any(live[structure.component[atoms]].any() for atoms, _ in alternatives[choice][way])
    }


def _count_free(structure: Structure) -> int:
    """Count the indices of parameters and buffers that can leave."""
    return sum(int((slot.units >= 0).sum()) for group in structure.groups.values() for slot in group.slots)


def _structured(ledger: Ledger, taken: Taken) -> tuple[Structure, dict[str, str]]:
    """Find the channel groups, and those that numbers in the code fix, each with the reason."""
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
    pinned_ = find_pinned(ledger, taken, component, roles["producer"], set(alone))
    return Structure(groups, pinned_, ledger, taken, component, members, tuple(links)), stuck


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
