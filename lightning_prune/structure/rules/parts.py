"""Rules for operators that take tensors apart and put them together."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_prune.structure.labels import INERT, PINNED, Label
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []


@coupling_rule("aten.cat", "aten.concat")
def cat(call: Call) -> Dims:
    """Labels along the joined dimension are joined; along the others, what lies side by side must leave together."""
    parts = [part for part in call.args[0] if part.dim() == call.out.dim()]  # torch lets old-style empty tensors pass
    joined = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % max(call.out.dim(), 1)
    dims: Dims = {}
    for dim in range(call.out.dim()):
        sides = [call.labels(part).at(dim) for part in parts]
        if not any(sides):
            continue
        dims[dim] = _join(sides, [p.shape[dim] for p in parts]) if dim == joined else call.ledger.tie(sides, "aten.cat")
    return dims


@coupling_rule("aten.stack")
def stack(call: Call) -> Dims:
    """What is stacked must have one shape, so what lies side by side must leave together."""
    at = call.argument("dim") % call.out.dim()
    parts = call.args[0]
    tied = {
        dim: call.ledger.tie([call.labels(p).at(dim) for p in parts], "aten.stack") for dim in range(parts[0].dim())
    }
    return {dim + (dim >= at): labels for dim, labels in tied.items()}


@coupling_rule("aten.slice", "aten.slice_copy", "aten.narrow")
def slice_(call: Call) -> Dims:
    """A slice of labels; the boundary moves with the width only if every block as long as it shrinks alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    start, stop, step = slice(call.argument("start"), call.argument("end"), call.argument("step")).indices(
        source.shape[dim]
    )
    labels = call.labels(source)
    if step == 1:
        _shrink_alike(call, labels.at(dim), math.gcd(start, stop, source.shape[dim]))
    elif start < step and stop == source.shape[dim] and stop % step == 0:
        for label in labels.at(dim):
            columns = label.atoms.reshape(-1, step)
            call.ledger.meet(columns[:, :1], columns[:, 1:])
    else:
        call.ledger.pin(labels.at(dim), "a slice with fixed bounds")
    cut = tuple(Label(label.atoms[start:stop:step], label.conditional) for label in labels.at(dim))
    return {**labels.dims, dim: cut if call.out.shape[dim] > 1 else _gone(call, cut)}


@coupling_rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.split_copy",
    "aten.split_with_sizes_copy",
    "aten.chunk",
    "aten.unsafe_split",
)
def split(call: Call) -> list[Dims]:
    """Pieces of labels; the boundaries move with the width only if every block shrinks alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    bounds = np.cumsum([part.shape[dim] for part in call.out])
    labels = call.labels(source)
    _shrink_alike(call, labels.at(dim), math.gcd(*map(int, bounds)))
    pieces = [
        tuple(Label(piece, label.conditional) for piece in np.split(label.atoms, bounds[:-1]))
        for label in labels.at(dim)
    ]
    whole = {d: found for d, found in labels.dims.items() if d != dim}
    return [
        whole | ({dim: tuple(piece[i] for piece in pieces)} if part.shape[dim] > 1 else {})
        for i, part in enumerate(call.out)
    ]


@coupling_rule("aten.select", "aten.unbind", "aten.select_copy", "aten.unbind_copy")
def select(call: Call) -> Dims | list[Dims]:
    """Taking single indices fixes the dimension that they are taken from."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    labels = call.labels(source)
    call.ledger.pin(labels.at(dim), "single indices are taken out of it")
    dims = {d - (d > dim): found for d, found in labels.dims.items() if d != dim}
    return dims if isinstance(call.out, Tensor) else [dims] * len(call.out)


@coupling_rule("aten.glu")
def glu(call: Call) -> Dims:
    """A gate: both halves must shrink alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    labels = call.labels(source)
    return {**labels.dims, dim: halves_meet(call, labels.at(dim))}


def halves_meet(call: Call, labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Let the two halves of each label meet and return one of them."""
    _shrink_alike(call, labels, len(labels[0].atoms) // 2 if labels else 1)
    return tuple(Label(label.atoms[: len(label.atoms) // 2], label.conditional) for label in labels)


def _shrink_alike(call: Call, labels: tuple[Label, ...], block: int) -> None:
    for label in labels:
        rows = label.atoms.reshape(-1, block)
        call.ledger.meet(rows[:1], rows[1:])


def _gone(call: Call, labels: tuple[Label, ...]) -> tuple[Label, ...]:
    call.ledger.pin(labels, "single indices are taken out of it")
    return ()


def _join(sides: list[tuple[Label, ...]], sizes: list[int]) -> tuple[Label, ...]:
    """Join labels end to end; a part without any has a fixed size, one with fewer than another is inert in the rest."""
    joined = []
    for layer in range(max(map(len, sides))):
        parts = [
            side[layer].atoms if layer < len(side) else np.full(size, INERT if side else PINNED, dtype=np.int64)
            for side, size in zip(sides, sizes, strict=True)
        ]
        conditional = any(layer >= len(side) > 0 or (side and side[layer].conditional) for side in sides)
        joined.append(Label(np.concatenate(parts), bool(conditional)))
    return tuple(joined)
