"""Rules for operators that only move elements, and which therefore can be run on labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.structure.labels import PINNED, Label
from lightning_prune.structure.rules.attach import attach, mapped, merge_, unknown
from lightning_prune.structure.rules.frozen_sizes import counted_by
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__ = ["repeat"]


@coupling_rule("aten.index", "aten._unsafe_index")
def index(call: Call) -> Dims:
    """A dimension indexed by a tensor is pinned, since the indices are data."""
    source, indices = call.args
    for dim, chosen in enumerate(indices):
        if chosen is not None:
            call.ledger.pin(call.labels(source).at(dim), "indexed by a tensor")
    return moved(call)


@coupling_rule("aten.roll", "aten.index_select")
def shifted(call: Call) -> Dims:
    """Dimensions that shifts and indices count along are pinned, since those are constants or data."""
    source = call.args[0]
    dims = call.argument("dims" if call.has("dims") else "dim")
    if isinstance(dims, int):
        dims = [dims]
    for dim in dims or range(source.dim()):
        call.ledger.pin(call.labels(source).at(dim % max(source.dim(), 1)), "counted along by fixed numbers")
    return moved(call)


@coupling_rule(
    "aten.flip", "aten.rot90", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d",
    "aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d", "aten.unfold", "aten.diagonal",
    "aten.tile", "aten.repeat_interleave.self_int",
)  # fmt: skip
def moved(call: Call) -> Dims:
    """Run the operator on the labels, which it moves like elements."""
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
            atoms = torch.from_numpy(np.require(label.atoms, requirements="W"))
            output = _rerun(call, atoms.reshape(shape).expand(source.shape))
            for d in range(output.dim()):
                if output.stride(d) == 0:  # still expanded: one entry stands for all
                    output = output.narrow(d, 0, 1)
            merge_(dims, attach(call, (dim, number), output.numpy(), range(call.out.dim()), label.conditional))
    return dims


@coupling_rule("aten.repeat")
def repeat(call: Call) -> Dims:
    """Labels repeat like elements; a dimension of size one takes the labels of the number it is repeated by."""
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
    """All groups of channels must lose the same channels, since they are interleaved."""
    source, groups = call.args[:2]
    for label in call.labels(source).at(1):
        rows = label.atoms.reshape(groups, -1)
        call.ledger.meet(rows[:1], rows[1:])
    return moved(call)


@coupling_rule("aten.im2col")
def unfold(call: Call) -> Dims:
    """``(N, C, H, W) -> (N, C r s, L)``: each channel becomes ``r s`` rows."""
    source, kernel = call.args[0], call.argument("kernel_size")
    labels, channel = call.labels(source), source.dim() - 3
    call.ledger.pin((*labels.at(channel + 1), *labels.at(channel + 2)), "positions of unfold")
    batch = {dim: found for dim, found in labels.dims.items() if dim < channel}
    rows = mapped(labels.at(channel), lambda atoms: np.repeat(atoms, kernel[0] * kernel[1]))
    return {**batch, channel: rows}


@coupling_rule("aten.constant_pad_nd")
def constant_pad(call: Call) -> Dims:
    """Padding is pinned along its own dimension; along the others, it belongs to its channel."""
    source, pads = call.args[:2]
    dims: Dims = {}
    for dim, found in call.labels(source).dims.items():
        before, after = pads[2 * (source.dim() - 1 - dim) :][:2] or (0, 0)  # torch counts pads from the last dimension
        if min(before, after) < 0:
            call.ledger.pin(found, "cropped by fixed numbers")
        else:
            dims[dim] = mapped(found, partial(np.pad, pad_width=(before, after), constant_values=PINNED))
    return dims


@coupling_rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_")
def put_by_index(call: Call) -> Dims:
    """The indexed dimension is pinned; the entries of rows are tied."""
    target, along, _, source = call.args[:4]
    mine, other = call.labels(target), call.labels(source)
    along %= max(target.dim(), 1)
    call.ledger.pin((*mine.at(along), *other.at(along)), "indexed by a tensor")
    dims: Dims = {}
    for dim in range(target.dim()):
        if dim != along and (mine.at(dim) or other.at(dim)):
            dims[dim] = call.ledger.tie([mine.at(dim), other.at(dim)], "meets a tensor of fixed size")
    return dims


@coupling_rule("aten.pixel_shuffle")
def pixel_shuffle(call: Call) -> Dims:
    """``(..., C r², H, W) -> (..., C, H r, W r)``: channels that become one are tied."""
    source, factor = call.args
    channel = source.dim() - 3
    dims = _positions_pinned(call, channel)
    return {**dims, channel: _each_block_one(call, dims.get(channel, ()), factor * factor)}


@coupling_rule("aten.pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Dims:
    """``(..., C, H r, W r) -> (..., C r², H, W)``: each channel becomes ``r²`` neighbours."""
    source, factor = call.args
    channel = source.dim() - 3
    dims = _positions_pinned(call, channel)
    spread = mapped(dims.get(channel, ()), lambda atoms: np.repeat(atoms, factor * factor))
    return {**dims, channel: spread}


@coupling_rule("aten.col2im")
def fold(call: Call) -> Dims:
    """``(N, C r s, L) -> (N, C, H, W)``: rows that become one channel are tied."""
    source, kernel = call.args[0], call.argument("kernel_size")
    labels, rows = call.labels(source), source.dim() - 2
    call.ledger.pin(labels.at(rows + 1), "positions of fold")
    batch = {dim: found for dim, found in labels.dims.items() if dim < rows}
    return {**batch, rows: _each_block_one(call, labels.at(rows), kernel[0] * kernel[1])}


def _each_block_one(call: Call, labels: tuple[Label, ...], size: int) -> tuple[Label, ...]:
    """Tie the atoms of each block of ``size`` neighbours, and return one atom for each block."""
    for label in labels:
        blocks = label.atoms.reshape(-1, size)
        call.ledger.meet(blocks[:, :1], blocks[:, 1:])
    return mapped(labels, lambda atoms: atoms.reshape(-1, size)[:, 0])


@coupling_rule("aten.as_strided")
def as_strided(call: Call) -> Dims:
    """Write labels to memory where the elements are, and read them like those."""
    source, size, stride = call.args[:3]
    offset = call.argument("storage_offset")
    start = 0 if offset is None else offset - source.storage_offset()
    last = start + _reach(size, stride)
    held = 1 + _reach(source.shape, source.stride())
    if not source.numel() or not call.out.numel() or start < 0 or last >= held:
        return unknown(call)  # it reads memory beyond the source
    dims: Dims = {}
    for dim, found in call.labels(source).dims.items():
        for number, label in enumerate(found):
            memory = torch.full((held,), PINNED)
            shape = [1] * source.dim()
            shape[dim] = source.shape[dim]
            atoms = torch.from_numpy(label.atoms.copy())
            memory.as_strided(source.shape, source.stride()).copy_(atoms.reshape(shape))
            read = memory.as_strided(size, stride, start).numpy()
            merge_(dims, attach(call, (dim, number), read, range(call.out.dim()), label.conditional))
    return dims


def _reach(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the offset in memory of the last element from the first."""
    return sum(step * (length - 1) for step, length in zip(stride, size, strict=True))


def _positions_pinned(call: Call, channel: int) -> Dims:
    """Pin the two dimensions behind the channels, and return the labels of the others."""
    dims = dict(call.labels(call.args[0]).dims)
    for dim in (channel + 1, channel + 2):
        call.ledger.pin(dims.pop(dim, ()), f"positions of {call.func._opname}")
    return dims


def _rerun(call: Call, carried: Tensor) -> Tensor:
    """Run the operator on labels."""
    args = [_on_cpu(value) for value in call.args[1:]]
    return call.func(carried, *args, **call.kwargs)


def _on_cpu(value: Any) -> Any:
    """Return arguments with tensors (indices) on the CPU, where labels are."""
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value
