"""Rules for reshapes, permutations, expansions and other views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lightning_prune.structure.rules.attach import attach, merge_, unknown
from lightning_prune.structure.rules.frozen_sizes import counted_by, follow
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule, tensors_among
from lightning_prune.structure.traced_ints import aligned

__all__ = ["expand"]

_BROADCASTS = ("expand_as", "broadcast_tensors")
_PRODUCTS = ("matmul", "__matmul__", "__rmatmul__")


@coupling_rule(
    "aten.view", "aten._unsafe_view", "aten._reshape_alias", "aten.reshape", "aten._reshape_copy", "aten.view_copy"
)
def reshape(call: Call) -> Dims:
    """Labels follow the dimensions that a reshape merges and splits."""
    source = call.args[0]
    if call.out.dtype != source.dtype and call.out.dim() and call.out.shape[-1] != source.shape[-1]:
        return unknown(call)  # view(dtype) regroups bytes
    if not source.numel():
        return unknown(call)
    dims: Dims = {}
    labels = call.labels(source)
    for inner, outer in _blocks(source.shape, call.out.shape):
        old_sizes = [source.shape[dim] for dim in inner]
        new_sizes = [call.out.shape[dim] for dim in outer]
        wide = [dim for dim, size in zip(outer, new_sizes, strict=True) if size > 1]
        alone = len(wide) == 1 and sum(size > 1 for size in old_sizes) == 1  # a dimension is what it was
        for position, dim in enumerate(inner):
            shape = [1] * len(inner)
            shape[position] = old_sizes[position]
            for number, label in enumerate(labels.at(dim)):
                if alone and label.atoms[0] != label.atoms[-1]:
                    merge_(dims, {wide[0]: (label,)})
                    continue
                atoms = np.broadcast_to(label.atoms.reshape(shape), old_sizes).reshape(new_sizes)
                merge_(dims, attach(call, (dim, number), atoms, outer, label.conditional))
    return follow(call, dims)


@coupling_rule("aten.permute", "aten.permute_copy")
def permute(call: Call) -> Dims:
    """Labels move with their dimensions."""
    source = call.args[0]
    return {new: call.labels(source).at(old % source.dim()) for new, old in enumerate(call.args[1])}


@coupling_rule("aten.transpose", "aten.transpose_", "aten.transpose_copy", "aten.swapaxes")
def transpose(call: Call) -> Dims:
    """Labels move with their dimensions."""
    source, first, second = call.args
    first, second = first % max(source.dim(), 1), second % max(source.dim(), 1)
    swap = {first: second, second: first}
    return {swap.get(dim, dim): labels for dim, labels in call.labels(source).dims.items()}


@coupling_rule("aten.t", "aten.t_", "aten.numpy_T", "aten.t_copy")
def t(call: Call) -> Dims:
    """Labels move with their dimensions."""
    last = call.args[0].dim() - 1
    return {last - dim: labels for dim, labels in call.labels(call.args[0]).dims.items()}


@coupling_rule("aten.unsqueeze", "aten.unsqueeze_", "aten.unsqueeze_copy")
def unsqueeze(call: Call) -> Dims:
    """Labels move with their dimensions."""
    at = call.argument("dim") % call.out.dim()
    return {dim + (dim >= at): labels for dim, labels in call.labels(call.args[0]).dims.items()}


@coupling_rule("aten.squeeze", "aten.squeeze_", "aten.squeeze_copy")
def squeeze(call: Call) -> Dims:
    """Only dimensions of size one are removed, and those have no labels."""
    source = call.args[0]
    squeezed: Sequence[int] = range(source.dim())
    if len(call.args) > 1:
        asked = call.args[1] if isinstance(call.args[1], list | tuple) else [call.args[1]]
        squeezed = [dim % max(source.dim(), 1) for dim in asked]
    kept = [dim for dim in range(source.dim()) if dim not in squeezed or source.shape[dim] != 1]
    return {new: call.labels(source).at(old) for new, old in enumerate(kept)}


@coupling_rule("aten.expand", "aten.expand_copy", "aten.broadcast_to")
def expand(call: Call) -> Dims:
    """Labels keep their dimensions, counted from the last; an expanded one takes the labels of its new size."""
    source, out = call.args[0], call.out
    shift = out.dim() - source.dim()
    dims = follow(call, {dim + shift: labels for dim, labels in call.labels(source).dims.items()})
    stretched = []
    for dim in range(out.dim()):
        if out.shape[dim] > 1 and (dim < shift or source.shape[dim - shift] == 1):
            stretched.append(dim)
    return dims | _stretched(call, stretched)


def _stretched(call: Call, stretched: Sequence[int]) -> Dims:
    """Return the labels of expanded dimensions: those of the number, or of the other tensor, that sets their size."""
    dims: Dims = {}
    if not stretched:
        return dims
    for dim, number in aligned(call.asked, call.out.shape):
        if dim in stretched and (found := counted_by(number)):
            dims[dim] = found
    args, kwargs = call.given
    name = getattr(call.function, "__name__", "")
    last = call.out.dim() - 2 if name in _PRODUCTS else call.out.dim()  # a product expands its batches alone
    for other in tensors_among((args, tuple(kwargs.values()))):
        shift = call.out.dim() - other.dim()
        beside = range(max(shift, 0), last)
        if shift and name not in (*_PRODUCTS, *_BROADCASTS):
            continue  # other arguments of a function may have the same size by chance
        if shift < 0 or any(other.shape[dim - shift] not in (1, call.out.shape[dim]) for dim in beside):
            continue
        for dim in beside:
            if dim in stretched and dim not in dims and (found := call.labels(other).at(dim - shift)):
                dims[dim] = found
    return dims


@coupling_rule(
    "aten.alias", "aten.detach", "aten.lift_fresh", "aten._to_copy", "aten.contiguous", "aten.zeros_like",
    "aten.ones_like", "aten.empty_like", "aten.full_like", "aten.zero_", "aten.fill_", "aten.fill", "aten.detach_",
    "aten.lift", "aten.native_dropout",
)  # fmt: skip
def unmoved(call: Call) -> Dims | list[Dims]:
    """Labels stay: the output has the shape of the first argument, element for element."""
    dims = call.labels(call.args[0]).dims
    return call.each_output(dims)


@coupling_rule("aten.as_strided_")
def restrided(call: Call) -> Dims:
    """Labels stay where sizes do (pooling changes strides of dimensions of size one); anything else is unknown."""
    dims = call.labels(call.args[0]).dims
    for dim, found in dims.items():
        if dim >= call.out.dim() or len(found[0].atoms) != call.out.shape[dim]:
            return unknown(call)
    lone = sum(size > 1 for size in call.out.shape) <= max(len(dims), 1)
    return dims if lone or call.out.is_contiguous() else unknown(call)


def _blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the shortest runs of dimensions of two shapes with equally many elements, pair by pair."""
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
