"""Rules for operators that only move elements: what each of them does to tensors, it does to labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.structure.labels import PINNED, Label
from lightning_prune.structure.rules.attach import attach, merge_, unknown
from lightning_prune.structure.rules.frozen_sizes import counted_by
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__ = ["repeat"]


@coupling_rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Dims:
    """Indices are numbers frozen in the data: a dimension indexed by a tensor keeps its size."""
    source, indices = call.args
    for dim, chosen in enumerate(indices):
        if chosen is not None:
            call.ledger.pin(call.labels(source).at(dim), "indexed by a tensor")
    return moved(call)


@coupling_rule("aten.roll", "aten.index_select")
def shifted(call: Call) -> Dims:
    """Shifts and indices are numbers frozen in code or data: the dimensions that they count along keep their size."""
    source = call.args[0]
    dims = call.argument("dims" if call.has("dims") else "dim")
    along = [dims] if isinstance(dims, int) else range(source.dim()) if dims is None else dims or range(source.dim())
    for dim in along:
        call.ledger.pin(call.labels(source).at(dim % max(source.dim(), 1)), "counted along by fixed numbers")
    return moved(call)


@coupling_rule(
    "aten.flip", "aten.rot90",
    "aten.reflection_pad1d", "aten.reflection_pad2d",
    "aten.reflection_pad3d", "aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d",
    "aten.unfold",
    "aten.diagonal", "aten.tile",
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
            carried = torch.from_numpy(np.require(label.atoms, requirements="W")).reshape(shape).expand(source.shape)
            moved_label = _rerun(call, carried)
            free = [d for d in range(moved_label.dim()) if moved_label.stride(d) == 0]
            for d in free:
                moved_label = moved_label.narrow(d, 0, 1)
            merge_(dims, attach(call, (dim, number), moved_label.numpy(), range(call.out.dim()), label.conditional))
    return dims


@coupling_rule("aten.repeat")
def repeat(call: Call) -> Dims:
    """Labels repeat as elements do; what was one is as many as was asked for."""
    source = call.args[0]
    dims = moved(call)
    shift = call.out.dim() - source.dim()
    if len(call.asked) != call.out.dim():
        return dims
    for dim, number in enumerate(call.asked):
        stretched = (dim < shift or source.shape[dim - shift] == 1) and call.out.shape[dim] == int(number) > 1
        if stretched and (found := counted_by(number)):
            dims[dim] = found
    return dims


@coupling_rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(call: Call) -> Dims:
    """So many groups of channels are dealt out like cards: all of them must lose the same share."""
    source, groups = call.args[:2]
    for label in call.labels(source).at(1):
        rows = label.atoms.reshape(groups, -1)
        call.ledger.meet(rows[:1], rows[1:])
    return moved(call)


@coupling_rule("aten.im2col")
def unfold(call: Call) -> Dims:
    """``(N, C, H, W) -> (N, C r s, L)``: a channel becomes several rows, whose padding goes with it."""
    source, kernel = call.args[0], call.argument("kernel_size")
    labels, channel = call.labels(source), source.dim() - 3
    call.ledger.pin((*labels.at(channel + 1), *labels.at(channel + 2)), "positions of unfold")
    rows = tuple(Label(np.repeat(f.atoms, kernel[0] * kernel[1]), f.conditional) for f in labels.at(channel))
    return {**{dim: found for dim, found in labels.dims.items() if dim < channel}, channel: rows}


@coupling_rule("aten.constant_pad_nd")
def constant_pad(call: Call) -> Dims:
    """What is added along a dimension stays; along the others, a channel is padded with more of itself."""
    source, pads = call.args[:2]
    dims: Dims = {}
    for dim, found in call.labels(source).dims.items():
        before, after = pads[2 * (source.dim() - 1 - dim) :][:2] or (0, 0)
        if min(before, after) < 0:
            call.ledger.pin(found, "cropped by fixed numbers")
        else:
            padded = (np.pad(label.atoms, (before, after), constant_values=PINNED) for label in found)
            dims[dim] = tuple(Label(atoms, label.conditional) for atoms, label in zip(padded, found, strict=True))
    return dims


@coupling_rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_")
def put_by_index(call: Call) -> Dims:
    """Rows go where indices say, so that their number stays; what a row holds meets entry by entry."""
    target, along, _, source = call.args[:4]
    mine, other = call.labels(target), call.labels(source)
    along %= max(target.dim(), 1)
    call.ledger.pin((*mine.at(along), *other.at(along)), "indexed by a tensor")
    return {
        dim: call.ledger.tie([mine.at(dim), other.at(dim)], "meets a tensor of fixed size")
        for dim in range(target.dim())
        if dim != along and (mine.at(dim) or other.at(dim))
    }


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


@coupling_rule("aten.col2im")
def fold(call: Call) -> Dims:
    """``(N, C r s, L) -> (N, C, H, W)``: the rows that become one channel leave together."""
    source, kernel = call.args[0], call.argument("kernel_size")
    labels, rows = call.labels(source), source.dim() - 2
    call.ledger.pin(labels.at(rows + 1), "positions of fold")
    blocks = [label.atoms.reshape(-1, kernel[0] * kernel[1]) for label in labels.at(rows)]
    for block in blocks:
        call.ledger.meet(block[:, :1], block[:, 1:])
    pairs = zip(blocks, labels.at(rows), strict=True)
    channels = tuple(Label(block[:, 0], label.conditional) for block, label in pairs)
    return {**{dim: found for dim, found in labels.dims.items() if dim < rows}, rows: channels}


@coupling_rule("aten.as_strided")
def as_strided(call: Call) -> Dims:
    """Reads memory: lay labels out in memory as the elements are, and read those."""
    source, size, stride = call.args[:3]
    offset = call.argument("storage_offset")
    start = 0 if offset is None else offset - source.storage_offset()
    behind = start + sum(step * (length - 1) for step, length in zip(stride, size, strict=True))
    held = 1 + sum(step * (length - 1) for step, length in zip(source.stride(), source.shape, strict=True))
    if not source.numel() or not call.out.numel() or start < 0 or behind >= held:
        return unknown(call)  # reaches beyond what the source shows
    dims: Dims = {}
    for dim, found in call.labels(source).dims.items():
        for number, label in enumerate(found):
            memory = torch.full((held,), PINNED)
            shape = [1] * source.dim()
            shape[dim] = source.shape[dim]
            memory.as_strided(source.shape, source.stride()).copy_(torch.from_numpy(label.atoms.copy()).reshape(shape))
            read = memory.as_strided(size, stride, start).numpy()
            merge_(dims, attach(call, (dim, number), read, range(call.out.dim()), label.conditional))
    return dims


def _positions_pinned(call: Call, channel: int) -> Dims:
    dims = dict(call.labels(call.args[0]).dims)
    for dim in (channel + 1, channel + 2):
        call.ledger.pin(dims.pop(dim, ()), f"positions of {call.func._opname}")
    return dims


def _rerun(call: Call, carried: Tensor) -> Tensor:
    """Run the operator on labels."""
    args: list[Any] = [carried, *call.args[1:]]
    kwargs = dict(call.kwargs)
    args = [_at_hand(a) for a in args]
    return call.func(*args, **kwargs)


def _at_hand(value: Any) -> Any:
    """Bring indices to where labels are."""
    if isinstance(value, list | tuple):
        return [_at_hand(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value
