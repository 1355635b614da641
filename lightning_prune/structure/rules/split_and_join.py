"""Rules for concatenation, slicing and splitting."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_prune.structure.labels import INERT, PINNED, Label
from lightning_prune.structure.rules.attach import mapped
from lightning_prune.structure.rules.frozen_sizes import follow_number
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule
from lightning_prune.structure.traced_ints import Number, Size, aligned, leaves

__all__: list[str] = []

_BY_COUNT = frozenset({"chunk", "unsafe_chunk"})


@coupling_rule("aten.cat", "aten.concat")
def cat(call: Call) -> Dims:
    """Labels are concatenated along the joined dimension, and tied along the others."""
    parts = [part for part in call.args[0] if part.dim() == call.out.dim()]  # torch skips empty tensors of rank one
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    joined = given % max(call.out.dim(), 1)
    filled = [part for part in parts if part.shape[joined]]
    dims: Dims = {}
    for dim in range(call.out.dim()):
        if dim == joined:
            sides = [call.labels(part).at(dim) for part in filled]
            if any(sides):
                dims[dim] = _join(sides, [part.shape[dim] for part in filled])
            continue
        sides = []
        for part in parts:
            found = call.labels(part).at(dim)
            if found or part.shape[joined]:  # an empty part without labels has no width that could be wrong
                sides.append(found)
        if any(sides):
            dims[dim] = call.ledger.tie(sides, "aten.cat")
    return dims


@coupling_rule("aten.stack")
def stack(call: Call) -> Dims:
    """Labels are tied along all dimensions, since stacked tensors have one shape."""
    at = call.argument("dim") % call.out.dim()
    parts = call.args[0]
    dims: Dims = {}
    for dim in range(parts[0].dim()):
        sides = [call.labels(part).at(dim) for part in parts]
        dims[dim + (dim >= at)] = call.ledger.tie(sides, "aten.stack")
    return dims


@coupling_rule("aten.slice", "aten.slice_copy", "aten.narrow")
def slice_(call: Call) -> Dims:
    """Labels are sliced; a bound that no number follows moves only if all blocks of its size shrink alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    first, end = call.argument("start"), call.argument("end")
    start, stop, step = slice(first, end, call.argument("step")).indices(source.shape[dim])
    labels = call.labels(source)
    if call.ledger.is_literal(dim):
        _pin_counted(call, labels.at(dim), first, end)
    elif step == 1:
        if not _follow_bounds(call, labels.at(dim), dim, start, stop):
            _shrink_alike(call, labels.at(dim), math.gcd(start, stop, source.shape[dim]))
    elif start < step and stop == source.shape[dim] and stop % step == 0:
        # Every step-th entry of all: the blocks of ``step`` entries, from which one is taken, are pruned as a whole.
        for label in labels.at(dim):
            columns = label.atoms.reshape(-1, step)
            call.ledger.meet(columns[:, :1], columns[:, 1:])
    else:
        call.ledger.pin(labels.at(dim), "a slice with fixed bounds")
    sliced = mapped(labels.at(dim), lambda atoms: atoms[start:stop:step])
    if call.out.shape[dim] <= 1:
        call.ledger.pin(sliced, "single indices are taken out of it")
        sliced = ()
    return {**labels.dims, dim: sliced}


@coupling_rule(
    "aten.split", "aten.split_with_sizes", "aten.split_copy", "aten.split_with_sizes_copy", "aten.chunk",
    "aten.unsafe_split", "aten.unsafe_split_with_sizes", "aten.unsafe_chunk",
)  # fmt: skip
def split(call: Call) -> list[Dims]:
    """Labels are split; bounds that no numbers follow move only if all blocks shrink alike."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    bounds = np.cumsum([part.shape[dim] for part in call.out])
    labels = call.labels(source)
    sizes = [part.shape[dim] for part in call.out]
    whole = {d: found for d, found in labels.dims.items() if d != dim}
    if not labels.at(dim):
        return [whole] * len(sizes)
    pieces = []  # the labels of each part
    for size, stop in zip(sizes, bounds, strict=True):
        part = slice(int(stop) - size, int(stop))
        pieces.append(mapped(labels.at(dim), operator.itemgetter(part)))
    if call.ledger.is_literal(dim):
        call.ledger.pin(labels.at(dim), "split in pieces of fixed size")
    elif not _follow_sizes(call, pieces, sizes):
        _shrink_alike(call, labels.at(dim), math.gcd(*map(int, bounds)))
    outputs = [whole] * len(sizes)
    for which, piece in enumerate(pieces):
        if sizes[which] > 1:  # a part of one index carries no label along it
            outputs[which] = whole | {dim: piece}
    return outputs


@coupling_rule("aten.select", "aten.unbind", "aten.select_copy", "aten.unbind_copy")
def select(call: Call) -> Dims | list[Dims]:
    """The dimension that single indices are taken from is pinned."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    labels = call.labels(source)
    call.ledger.pin(labels.at(dim), "single indices are taken out of it")
    dims = {d - (d > dim): found for d, found in labels.dims.items() if d != dim}
    return call.each_output(dims)


@coupling_rule("aten.glu")
def glu(call: Call) -> Dims:
    """Both halves must shrink alike, since they are multiplied with each other."""
    source = call.args[0]
    dim = call.argument("dim") % source.dim()
    labels = call.labels(source)
    return {**labels.dims, dim: halves_meet(call, labels.at(dim))}


def halves_meet(call: Call, labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Tie the two halves of each label and return one of them."""
    _shrink_alike(call, labels, len(labels[0].atoms) // 2 if labels else 1)
    return mapped(labels, lambda atoms: atoms[: len(atoms) // 2])


def _pin_counted(call: Call, labels: tuple[Label, ...], *bounds: int | None) -> None:
    """Pin the entries between each bound of a slice, a constant in the code, and the end it is counted from.

    Entries beyond the bound can be pruned.
    """
    for label in labels:
        size = len(label.atoms)
        for bound in bounds:
            if bound is not None and -size < bound < size and bound:
                counted = label.atoms[:bound] if bound > 0 else label.atoms[bound:]
                call.ledger.pin([Label(counted, label.conditional)], "counted by a number in the code")


def _shrink_alike(call: Call, labels: tuple[Label, ...], block: int) -> None:
    """Tie the atoms at the same place of all blocks of a size."""
    for label in labels:
        rows = label.atoms.reshape(-1, block)
        call.ledger.meet(rows[:1], rows[1:])


def _follow_sizes(call: Call, pieces: list[tuple[Label, ...]], sizes: list[int]) -> bool:
    """Record that requested sizes follow the labels of pieces; return whether pieces may shrink on their own."""
    if getattr(call.function, "__name__", "") in _BY_COUNT:  # which give a number of pieces, not their size
        return False
    if len(set(sizes)) == 1 and isinstance(call.args[1], int):  # one number for all pieces: they shrink alike
        held = [number for number in call.asked if isinstance(number, Number) and number == sizes[0]]
        if held:
            for piece in pieces:
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
    """Record that the bounds of a slice follow the labels before them; return whether both do."""
    size = len(labels[0].atoms) if labels else 0
    bounds = []
    clipped = getattr(call.function, "__name__", "") != "narrow"  # whose length must fit
    for bound, given in zip((start, stop), _bounds_given(call, dim), strict=True):
        if not 0 < bound < size and (clipped or bound != size):
            continue
        numbers = [n for n in given if isinstance(n, Number) and int(n) == bound and not _counts_labels(n)]
        if not numbers:
            return False
        bounds.append((bound, numbers[0]))
    for bound, number in bounds:
        follow_number(call, mapped(labels, operator.itemgetter(slice(bound))), number)
    return bool(bounds)


def _bounds_given(call: Call, dim: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the arguments of Python that may be the start, and those that may be the stop, of a slice."""
    name = getattr(call.function, "__name__", "")
    if name in ("__getitem__", "__setitem__"):
        entry = _entry_along(call, dim)
        if entry is None:
            return (), ()
        return [entry.start], [entry.stop]
    if name == "narrow":
        start, length = call.python_argument("start", 2), call.python_argument("length", 3)
        known = isinstance(start, int) and isinstance(length, int)
        return [start], [start + length] if known else ()
    if name == "tensor_split" and isinstance(call.python_argument("indices_or_sections", 1), int):
        return (), ()  # a number of pieces, not where they begin
    return call.asked, call.asked  # others have no other numbers


def _entry_along(call: Call, dim: int) -> slice | None:
    """Return the slice of an index that applies to a dimension, counted after the integers before it are applied."""
    source, index = call.given[0][:2]
    entries = index if isinstance(index, tuple) else (index,)
    counted = [entry for entry in entries if entry is not None and entry is not Ellipsis and entry is not True]
    at = 0
    for entry in entries:
        if entry is Ellipsis:
            at += source.dim() - len(counted)
        elif isinstance(entry, slice) and at == dim:
            return entry
        elif not isinstance(entry, int) or isinstance(entry, bool):  # an integer removes its dimension
            at += 1
    return None


def _counts_labels(number: Number) -> bool:
    """Return whether a number was computed from the size of a tensor, so that it changes with the width by itself."""
    return any(isinstance(origin, Size) for origin, _ in leaves(number))


def _join(sides: list[tuple[Label, ...]], sizes: list[int]) -> tuple[Label, ...]:
    """Concatenate labels; parts without labels are pinned, and parts with fewer than others are padded as inert."""
    joined = []
    for layer in range(max(map(len, sides))):
        atoms, conditional = [], False
        for side, size in zip(sides, sizes, strict=True):
            if not side:  # of fixed size
                atoms.append(np.full(size, PINNED, dtype=np.int64))
            elif layer < len(side):
                atoms.append(side[layer].atoms)
                conditional |= side[layer].conditional
            else:
                atoms.append(np.full(size, INERT, dtype=np.int64))
                conditional = True
        joined.append(Label(np.concatenate(atoms), conditional))
    return tuple(joined)


@coupling_rule("aten._pack_padded_sequence")
def pack_padded(call: Call) -> list[Dims]:
    """Steps and examples become one dimension; the features of each step pass."""
    return [{dim - 1: found for dim, found in call.labels(call.args[0]).dims.items() if dim > 1}, {}]
