"""Lays labels of any shape along the dimensions of a tensor, and pins what cannot be laid; no operator’s own rule."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Label
from lightning_prune.structure.rules.table import Call, Dims

__all__ = ["attach", "merge_", "tie_merged", "unknown"]


def attach(call: Call, key: Hashable, atoms: Atoms, dims: Sequence[int], conditional: bool) -> Dims:
    """Lay labels of any shape along the dimensions on which they vary.

    Where they vary along several, only one of those can shrink, and all atoms at one of its indices leave together.

    Args:
        call: The operator at hand.
        key: What names this label among those of the operator.
        atoms: One atom per element; a dimension of size one stands for any size.
        dims: The output's dimension for each dimension of ``atoms``.
        conditional: Whether the atoms belong to an earlier choice.
    """
    varying = [axis for axis, size in enumerate(atoms.shape) if size > 1 and (atoms != atoms.take([0], axis)).any()]
    if not varying:
        if atoms.size and atoms.flat[0] not in (PINNED, INERT):
            call.ledger.pin([Label(atoms.reshape(-1)[:1])], "one channel spread over a whole tensor")
        return {}
    atoms = atoms[tuple(slice(None) if axis in varying else 0 for axis in range(atoms.ndim))]
    targets = [dims[axis] for axis in varying]
    if len(varying) == 1:
        return {targets[0]: (Label(atoms, conditional),)}
    labels = call.ledger.split(key, atoms, range(atoms.ndim), targets)
    return {dim: (label,) for dim, label in zip(targets, labels, strict=True)}


def merge_(dims: Dims, more: Dims) -> None:
    """Add labels to those that dimensions have already."""
    for dim, labels in more.items():
        dims[dim] = dims.get(dim, ()) + labels


def tie_merged(call: Call, sides: list[tuple[Label, ...]], reason: str) -> tuple[Label, ...]:
    """Let labels meet, of which one side may carry several since it was merged from several dimensions.

    A vector as long as a flattened kernel has one atom for each of its entries. Those of one channel, or those of one
    position in the kernel, can leave together: along one of the merged dimensions, not along all of them.
    """
    for merged, plain in (sides, sides[::-1]) if len(sides) == 2 else ():
        if len(merged) < 2 or len(plain) != 1 or any(label.conditional for label in (*merged, *plain)):
            continue
        orders = [np.argsort(label.atoms, kind="stable") for label in merged]
        counts = [np.unique(label.atoms, return_inverse=True, return_counts=True)[1:] for label in merged]
        if any((count != count[0]).any() for _, count in counts):
            continue
        blocks = [plain[0].atoms[o].reshape(len(count), -1).T for o, (_, count) in zip(orders, counts, strict=True)]
        ways = call.ledger.choose("merged", {axis: [block] for axis, block in enumerate(blocks)})
        for label, way, (places, _) in zip(merged, ways, counts, strict=True):
            call.ledger.tie([(label,), (Label(way.atoms[places], conditional=True),)], reason)
        return merged
    return call.ledger.tie(sides, reason)


def unknown(call: Call) -> Dims:
    """Pin whatever reaches an operator that nobody taught us."""
    for tensor in call.tensors():
        for found in call.labels(tensor).dims.values():
            call.ledger.pin(found, f"{call.func.overloadpacket} has no coupling rule; teach one with @coupling_rule")
    return {}
