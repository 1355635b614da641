"""Lays labels of any shape along the dimensions of a tensor, and pins what cannot be laid; no operator’s own rule."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Label
from lightning_prune.structure.rules.table import Call, Dims

__all__ = ["attach", "merge_", "unknown"]


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


def unknown(call: Call) -> Dims:
    """Pin whatever reaches an operator that nobody taught us."""
    for tensor in call.tensors():
        for found in call.labels(tensor).dims.values():
            call.ledger.pin(found, f"{call.func.overloadpacket} has no coupling rule; teach one with @coupling_rule")
    return {}
