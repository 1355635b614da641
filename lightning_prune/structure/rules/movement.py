"""Rules for operators that only move elements: what each of them does to tensors, it does to labels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.structure.labels import INERT, PINNED, Atoms, Label
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__ = ["attach", "halves_meet"]


@coupling_rule(
    "aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.reshape", "aten._reshape_copy", "aten.view_copy"
)
def reshape(call: Call) -> Dims:
    """Labels follow the blocks of dimensions that a reshape merges and splits."""
    source = call.args[0]
    if call.out.dtype != source.dtype and call.out.dim() and call.out.shape[-1] != source.shape[-1]:
        return unknown(call)  # view(dtype) regroups bytes
    if not source.numel():
        return unknown(call)
    dims: Dims = {}
    labels = call.labels(source)
    for inner, outer in _blocks(source.shape, call.out.shape):
        for position, dim in enumerate(inner):
            for number, label in enumerate(labels.at(dim)):
                sizes = [source.shape[d] for d in inner]
                shape = [1] * len(inner)
                shape[position] = sizes[position]
                atoms = np.broadcast_to(label.atoms.reshape(shape), sizes).reshape([call.out.shape[d] for d in outer])
                _merge(dims, attach(call, (dim, number), atoms, outer, label.conditional))
    return dims


@coupling_rule("aten.permute", "aten.permute_copy")
def permute(call: Call) -> Dims:
    """Labels keep to their dimensions."""
    source = call.args[0]
    return {new: call.labels(source).at(old % source.dim()) for new, old in enumerate(call.args[1])}


@coupling_rule("aten.transpose", "aten.transpose_copy", "aten.swapaxes")
def transpose(call: Call) -> Dims:
    """Labels keep to their dimensions."""
    source, first, second = call.args
    first, second = first % max(source.dim(), 1), second % max(source.dim(), 1)
    swap = {first: second, second: first}
    return {swap.get(dim, dim): labels for dim, labels in call.labels(source).dims.items()}


@coupling_rule("aten.t", "aten.numpy_T", "aten.t_copy")
def t(call: Call) -> Dims:
    """Labels keep to their dimensions."""
    last = call.args[0].dim() - 1
    return {last - dim: labels for dim, labels in call.labels(call.args[0]).dims.items()}


@coupling_rule("aten.unsqueeze", "aten.unsqueeze_copy")
def unsqueeze(call: Call) -> Dims:
    """Labels keep to their dimensions."""
    at = call.argument("dim") % call.out.dim()
    return {dim + (dim >= at): labels for dim, labels in call.labels(call.args[0]).dims.items()}


@coupling_rule("aten.squeeze", "aten.squeeze_", "aten.squeeze_copy")
def squeeze(call: Call) -> Dims:
    """Only dimensions of size one leave, and those carry no labels."""
    source = call.args[0]
    kept = list(range(source.dim()))
    if len(call.args) > 1:
        asked = call.args[1] if isinstance(call.args[1], list | tuple) else [call.args[1]]
        gone = {dim % max(source.dim(), 1) for dim in asked}
        kept = [dim for dim in kept if dim not in gone or source.shape[dim] != 1]
    else:
        kept = [dim for dim in kept if source.shape[dim] != 1]
    return {new: call.labels(source).at(old) for new, old in enumerate(kept)}


@coupling_rule("aten.expand", "aten.expand_copy", "aten.broadcast_to")
def expand(call: Call) -> Dims:
    """Labels keep to their dimensions, counted from the last."""
    shift = call.out.dim() - call.args[0].dim()
    return {dim + shift: labels for dim, labels in call.labels(call.args[0]).dims.items()}


@coupling_rule(
    "aten.alias", "aten.detach", "aten.lift_fresh", "aten._to_copy", "aten.contiguous", "aten.zeros_like", "aten.ones_like",
    "aten.empty_like", "aten.full_like", "aten.rand_like", "aten.randn_like", "aten.zero_", "aten.fill_", "aten.detach_",
    "aten.lift", "aten.native_dropout",
)  # fmt: skip
def unmoved(call: Call) -> Dims | list[Dims]:
    """The result has the shape of the first argument, element for element."""
    dims = call.labels(call.args[0]).dims
    return dims if isinstance(call.out, Tensor) else [dims] * len(call.out)


@coupling_rule("aten.as_strided", "aten.as_strided_")
def as_strided(call: Call) -> Dims:
    """Pooling restrides dimensions of size one; anything else reads memory that labels know nothing of."""
    dims = call.labels(call.args[0]).dims
    same = all(dim < call.out.dim() and len(found[0].atoms) == call.out.shape[dim] for dim, found in dims.items())
    return dims if same and sum(size > 1 for size in call.out.shape) <= max(len(dims), 1) else unknown(call)


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


@coupling_rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Dims:
    """Indices are numbers frozen in the data: a dimension indexed by a tensor keeps its size."""
    source, indices = call.args
    for dim, chosen in enumerate(indices):
        if chosen is not None:
            call.ledger.pin(call.labels(source).at(dim), "indexed by a tensor")
    return moved(call)


@coupling_rule("aten.roll", "aten.index_select", "aten.gather", "aten.take_along_dim")
def shifted(call: Call) -> Dims:
    """A shift or indices are numbers frozen in code or data, so the dimensions that they count along keep their size."""
    source = call.args[0]
    dims = call.argument("dims" if call.has("dims") else "dim")
    along = [dims] if isinstance(dims, int) else range(source.dim()) if dims is None else dims or range(source.dim())
    for dim in along:
        call.ledger.pin(call.labels(source).at(dim % max(source.dim(), 1)), "counted along by fixed numbers")
    return moved(call)


@coupling_rule(
    "aten.flip", "aten.rot90", "aten.constant_pad_nd", "aten.repeat",
    "aten.channel_shuffle", "aten.native_channel_shuffle", "aten.reflection_pad1d", "aten.reflection_pad2d",
    "aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d", "aten.unfold",
    "aten.im2col", "aten.diagonal", "aten.tile",
    "aten.repeat_interleave.self_int",
)  # fmt: skip
def moved(call: Call) -> Dims:
    """Whatever the operator does to elements, it does to labels: run it on them."""
    source = call.args[0]
    dims: Dims = {}
    for other in call.tensors():
        if other is not source:
            for found in call.labels(other).dims.values():
                call.ledger.pin(found, "used as indices")
    for dim, found in call.labels(source).dims.items():
        for number, label in enumerate(found):
            shape = [1] * source.dim()
            shape[dim] = source.shape[dim]
            carried = torch.from_numpy(label.atoms).reshape(shape).expand(source.shape)
            moved_label = _rerun(call, carried)
            free = [d for d in range(moved_label.dim()) if moved_label.stride(d) == 0]
            for d in free:
                moved_label = moved_label.narrow(d, 0, 1)
            _merge(dims, attach(call, (dim, number), moved_label.numpy(), range(call.out.dim()), label.conditional))
    return dims


@coupling_rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call) -> Dims:
    """``(..., C r², H, W) -> (..., C, H r, W r)``: the channels that become one leave together."""
    source, factor = call.args
    channel = source.dim() - 3
    dims = _positions_pinned(call, channel)
    rows = [label.atoms.reshape(-1, factor * factor) for label in dims.get(channel, ())]
    for row in rows:
        call.ledger.meet(row[:, :1], row[:, 1:])
    pairs = zip(rows, dims.get(channel, ()), strict=True)
    return {**dims, channel: tuple(Label(row[:, 0], label.conditional) for row, label in pairs)}


@coupling_rule("aten.pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Dims:
    """``(..., C, H r, W r) -> (..., C r², H, W)``: a channel becomes several, side by side."""
    source, factor = call.args
    channel = source.dim() - 3
    dims = _positions_pinned(call, channel)
    spread = (Label(np.repeat(label.atoms, factor * factor), label.conditional) for label in dims.get(channel, ()))
    return {**dims, channel: tuple(spread)}


def _positions_pinned(call: Call, channel: int) -> Dims:
    dims = dict(call.labels(call.args[0]).dims)
    for dim in (channel + 1, channel + 2):
        call.ledger.pin(dims.pop(dim, ()), f"positions of {call.func._opname}")
    return dims


def unknown(call: Call) -> Dims:
    """Pin whatever reaches an operator that nobody taught us."""
    for tensor in call.tensors():
        for found in call.labels(tensor).dims.values():
            call.ledger.pin(found, f"{call.func.overloadpacket} has no coupling rule; teach one with @coupling_rule")
    return {}


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
    """Join labels end to end; where a part has none its size is fixed, where it has fewer than another the rest is inert."""
    joined = []
    for layer in range(max(map(len, sides))):
        parts = [
            side[layer].atoms if layer < len(side) else np.full(size, INERT if side else PINNED, dtype=np.int64)
            for side, size in zip(sides, sizes, strict=True)
        ]
        conditional = any(layer >= len(side) > 0 or (side and side[layer].conditional) for side in sides)
        joined.append(Label(np.concatenate(parts), bool(conditional)))
    return tuple(joined)


def _blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pair up the shortest runs of dimensions of two shapes that hold equally many elements."""
    i = j = 0
    while i < len(source) and j < len(target):
        inner, outer = [i], [j]
        left, right = source[i], target[j]
        while left != right:
            if left < right:
                i += 1
                inner.append(i)
                left *= source[i]
            else:
                j += 1
                outer.append(j)
                right *= target[j]
        i, j = i + 1, j + 1
        yield inner, outer


def _merge(dims: Dims, more: Dims) -> None:
    for dim, labels in more.items():
        dims[dim] = dims.get(dim, ()) + labels


def _rerun(call: Call, carried: Tensor) -> Tensor:
    """Run the operator on labels; what it pads with is pinned."""
    args: list[Any] = [carried, *call.args[1:]]
    kwargs = dict(call.kwargs)
    if call.func.overloadpacket is torch.ops.aten.constant_pad_nd:
        args, kwargs = args[:2], {"value": PINNED}
    if call.func.overloadpacket is torch.ops.aten.im2col:
        return call.func(carried.to(torch.float64), *args[1:], **kwargs).to(torch.int64)  # has no integer kernel
    args = [_at_hand(a) for a in args]
    return call.func(*args, **kwargs)


def _at_hand(value: Any) -> Any:
    """Bring indices to where labels are; on the meta device they have no values, and the trace must run in full."""
    if isinstance(value, list | tuple):
        return [_at_hand(item) for item in value]
    if isinstance(value, Tensor) and value.is_meta:
        raise NotImplementedError("indices on the meta device have no values")
    return value.cpu() if isinstance(value, Tensor) else value
