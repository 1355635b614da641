"""Attaching labels of any shape to the dimensions of a tensor; what cannot be attached is pinned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Label
from lightning_prune.structure.rules.table import Call, Dims

__all__ = ["attach", "mapped", "merge_", "tie_merged", "unknown"]


def attach(call: Call, key: Hashable, atoms: Atoms, dims: Sequence[int], conditional: bool) -> Dims:
    """Attach labels of any shape to the dimensions along which they vary.

    If they vary along several, only one of those can shrink: a choice, by which all atoms at one index are pruned
    together.

    Args:
        call: The operator at hand.
        key: Identifies this label among those of the operator.
        atoms: One atom per element; a dimension of size one stands for any size.
        dims: The output's dimension for each dimension of ``atoms``.
        conditional: Whether the atoms belong to an earlier choice.
    """
    varying = []
    for axis, size in enumerate(atoms.shape):
        if size > 1 and (atoms != atoms.take([0], axis)).any():
            varying.append(axis)
    if not varying:
        if atoms.size and atoms.flat[0] not in (PINNED, INERT):
            call.ledger.pin([Label(atoms.reshape(-1)[:1])], "one channel spread over a whole tensor")
        return {}
    constant = tuple(axis for axis in range(atoms.ndim) if axis not in varying)
    atoms = atoms[tuple(0 if axis in constant else slice(None) for axis in range(atoms.ndim))]
    targets = [dims[axis] for axis in varying]
    if len(varying) == 1:
        return {targets[0]: (Label(atoms, conditional),)}
    labels = call.ledger.split(key, atoms, range(atoms.ndim), targets)
    return {dim: (label,) for dim, label in zip(targets, labels, strict=True)}


def mapped(labels: Iterable[Label], change: Callable[[Atoms], Atoms]) -> tuple[Label, ...]:
    """Return labels with changed atoms."""
    return tuple(Label(change(label.atoms), label.conditional) for label in labels)


def merge_(dims: Dims, more: Dims) -> None:
    """Add labels to those that dimensions already have."""
    for dim, labels in more.items():
        dims[dim] = dims.get(dim, ()) + labels


def tie_merged(call: Call, sides: list[tuple[Label, ...]], reason: str) -> tuple[Label, ...]:
    """Tie labels, of which one side may carry several because it was merged from several dimensions.

    A vector as long as a flattened kernel has one atom for each entry. The entries of one channel, or of one kernel
    position, can be pruned together: along one of the merged dimensions, not along all of them.
    """
    if len(sides) == 2:
        for merged, plain in (sides, sides[::-1]):
            mergeable = len(merged) > 1 and len(plain) == 1
            # Labels that an earlier choice made cannot be part of another one.
            chosen = any(label.conditional for label in (*merged, *plain))
            if mergeable and not chosen and _offer(call, merged, plain[0], reason):
                return merged
    return call.ledger.tie(sides, reason)


def _offer(call: Call, merged: tuple[Label, ...], plain: Label, reason: str) -> bool:
    """Offer each merged dimension as a way to prune ``plain``; return False if one holds its atoms unequally often."""
    alternatives: dict[Hashable, list[Atoms]] = {}
    places = []
    for axis, label in enumerate(merged):
        _, place, count = np.unique(label.atoms, return_inverse=True, return_counts=True)
        if (count != count[0]).any():
            return False
        # One column of the block for each index along this dimension: the entries of ``plain`` at that index.
        order = np.argsort(label.atoms, kind="stable")
        alternatives[axis] = [plain.atoms[order].reshape(len(count), -1).T]
        places.append(place)
    handed = call.ledger.choose("merged", alternatives)
    for label, alternative, place in zip(merged, handed, places, strict=True):
        call.ledger.tie([(label,), (Label(alternative.atoms[place], conditional=True),)], reason)
    return True


def unknown(call: Call) -> Dims:
    """Pin all labels that reach an operator without a rule."""
    for tensor in call.tensors():
        for found in call.labels(tensor).dims.values():
            call.ledger.pin(found, f"{call.func.overloadpacket} has no coupling rule; add one with @coupling_rule")
    return {}
