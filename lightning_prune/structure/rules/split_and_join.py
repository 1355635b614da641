"""Rules for operators that take tensors apart and put them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_prune.structure.labels import INERT, PINNED, Label
from lightning_prune.structure.rules.frozen_sizes import follow_number
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule
from lightning_prune.structure.traced_ints import Derived, Number, Size, aligned

__all__: list[str] = []


@coupling_rule("aten.cat", "aten.concat")
def cat(call: Call) -> Dims:
    """Labels along the joined dimension are joined; along the others, what lies side by side must leave together."""
    parts = [part for part in call.args[0] if part.dim() == call.out.dim()]  # torch lets old-style empty tensors pass
    joined = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % max(call.out.dim(), 1)
    filled = [part for part in parts if part.shape[joined]]
    dims: Dims = {}
    for dim in range(call.out.dim()):
        if dim == joined:
            sides = [call.labels(part).at(dim) for part in filled]
            if any(sides):
                dims[dim] = _join(sides, [part.shape[dim] for part in filled])
            continue
        # a part that holds nothing has the others' width if it follows that, and none that could be wrong if not
        sides = [found for part in parts if (found := call.labels(part).at(dim)) or part.shape[joined]]
        if any(sides):
            dims[dim] = call.ledger.tie(sides, "aten.cat")
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
    if call.ledger.is_literal(dim):
        _pin_counted(call, labels.at(dim), call.argument("start"), call.argument("end"))
    elif step == 1:
        if not _follow_bounds(call, labels.at(dim), dim, start, stop):
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
    "aten.unsafe_split_with_sizes",
    "aten.unsafe_chunk",
)
def split(call: Call) -> list[Dims]:
    """Pieces of labels; the boundaries move with the width only if every block shrinks alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    bounds = np.cumsum([part.shape[dim] for part in call.out])
    labels = call.labels(source)
    pieces = [
        tuple(Label(piece, label.conditional) for piece in np.split(label.atoms, bounds[:-1]))
        for label in labels.at(dim)
    ]
    if call.ledger.is_literal(dim):
        call.ledger.pin(labels.at(dim), "split in pieces of fixed size")
    elif not _follow_sizes(call, list(zip(*pieces, strict=True)), [part.shape[dim] for part in call.out]):
        _shrink_alike(call, labels.at(dim), math.gcd(*map(int, bounds)))
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


def _pin_counted(call: Call, labels: tuple[Label, ...], *bounds: int | None) -> None:
    """Pin what lies between the bounds of a slice, which are numbers in the code, and the end they are counted from.

    What lies beyond them may leave.
    """
    for label in labels:
        size = len(label.atoms)
        for bound in bounds:
            if bound is not None and -size < bound < size and bound:
                counted = label.atoms[:bound] if bound > 0 else label.atoms[bound:]
                call.ledger.pin([Label(counted, label.conditional)], "counted by a number in the code")


def _shrink_alike(call: Call, labels: tuple[Label, ...], block: int) -> None:
    for label in labels:
        rows = label.atoms.reshape(-1, block)
        call.ledger.meet(rows[:1], rows[1:])


def _follow_sizes(call: Call, pieces: list[tuple[Label, ...]], sizes: list[int]) -> bool:
    """Let the sizes of pieces follow them; return whether all do, so that each piece may shrink on its own."""
    if len(set(sizes)) == 1 and isinstance(call.args[1], int):  # one size for all
        held = [number for number in call.asked if isinstance(number, Number) and number == sizes[0]]
        for piece in pieces if held else ():
            follow_number(call, piece, held[0])
        return False
    asked = [number for _, number in aligned(call.asked, sizes)]
    if len(asked) < len(sizes) or not any(isinstance(number, Number) for number in asked):
        return False
    for piece, number in zip(pieces, asked, strict=True):
        if isinstance(number, Number):
            follow_number(call, piece, number)
        else:
            call.ledger.pin(piece, "a piece of fixed size")
    return True


def _follow_bounds(call: Call, labels: tuple[Label, ...], dim: int, start: int, stop: int) -> bool:
    """Let the bounds of a slice follow what lies before them; return whether both do."""
    size = len(labels[0].atoms) if labels else 0
    bounds = []
    for bound, given in zip((start, stop), _bounds_given(call, dim), strict=True):
        if not 0 < bound < size:
            continue
        number = next((n for n in given if isinstance(n, Number) and int(n) == bound and not _counts_labels(n)), None)
        if number is None:
            return False
        bounds.append((bound, number))
    for bound, number in bounds:
        follow_number(call, tuple(Label(label.atoms[:bound], label.conditional) for label in labels), number)
    return bool(bounds)


def _bounds_given(call: Call, dim: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return what Python may have given as start and as stop of a slice along a dimension."""
    name = getattr(call.function, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        entry = _entry_along(call, dim)
        return ([entry.start], [entry.stop]) if entry is not None else ((), ())
    if name == "narrow":
        start, length = call.python_argument("start", 2), call.python_argument("length", 3)
        whole = isinstance(start, int) and isinstance(length, int)
        return [start], [start + length] if whole else ()
    return call.asked, call.asked  # of ``tensor_split`` and the like, which have no other numbers


def _entry_along(call: Call, dim: int) -> slice | None:
    """Return the entry of an index that slices a dimension, as it is counted once the entries before it are done."""
    source, index = call.given[0][:2]
    entries = index if isinstance(index, tuple) else (index,)
    counted = [entry for entry in entries if entry is not None and entry is not Ellipsis and entry is not True]
    at = 0
    for entry in entries:
        if entry is Ellipsis:
            at += source.dim() - len(counted)
        elif isinstance(entry, slice) and at == dim:
            return entry
        elif not isinstance(entry, int) or isinstance(entry, bool):  # a whole number takes its dimension away
            at += 1
    return None


def _counts_labels(number: Number) -> bool:
    """Tell whether a size of a tensor went into a number, so that it moves with the width by itself."""
    origin = number.origin
    sides = (origin.left, origin.right) if isinstance(origin, Derived) else ()
    return isinstance(origin, Size) or any(_counts_labels(side) for side in sides if isinstance(side, Number))


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


@coupling_rule("aten._pack_padded_sequence")
def pack_padded(call: Call) -> list[Dims]:
    """Steps and examples become one dimension; what each step holds passes."""
    return [{dim - 1: found for dim, found in call.labels(call.args[0]).dims.items() if dim > 1}, {}]
