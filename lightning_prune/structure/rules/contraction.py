"""Rules for matrix products, convolutions and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_prune.structure.labels import PINNED, Label
from lightning_prune.structure.rules.attach import tie_merged, unknown
from lightning_prune.structure.rules.frozen_sizes import follow_argument
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []

_GROUPS_AT = {
    "conv1d": 6, "conv2d": 6, "conv3d": 6, "conv_transpose1d": 6, "conv_transpose2d": 6, "conv_transpose3d": 6,
    "convolution": 8,
}  # fmt: skip
"""Python function -> position of its argument ``groups``."""
_OUTER, _INNER = "whole groups", "the same share of every group"


@coupling_rule("aten.mm", reduces=True)
def mm(call: Call) -> Dims:
    """``(m, k) @ (k, n)``: the summed dimensions are tied, the others pass."""
    return _product(call, call.args[0], call.args[1])


@coupling_rule("aten.addmm", "aten.baddbmm", reduces=True)
def addmm(call: Call) -> Dims:
    """A matrix product, tied to the addend element by element."""
    addend, a, b = call.args[:3]
    return _added(call, addend, _product(call, a, b))


@coupling_rule("aten._sparse_addmm")
def sparse_addmm(call: Call) -> Dims:
    """A sparse matrix times ``(k, n)``: columns pass; rows are pinned, since sparse indices are data."""
    addend, _, dense = call.args[:3]
    call.ledger.pin(call.labels(dense).at(0), "multiplied with a sparse tensor")
    dims = {1: _made(call, dense, 1)}
    if call.labels(addend).blank:  # zeros that torch itself adds, as wide as the product
        return dims
    return _added(call, addend, dims)


@coupling_rule("aten.bmm", reduces=True)
def bmm(call: Call) -> Dims:
    """``(b, m, k) @ (b, k, n)``: batch and summed dimensions are tied, the others pass."""
    return _product(call, call.args[0], call.args[1])


@coupling_rule("aten._grouped_mm", reduces=True)
def grouped_mm(call: Call) -> Dims:
    """Rows ``(m, k)``, each times one of the matrices ``(e, k, n)``, whose number is pinned: data choose them."""
    a, b = call.args[:2]
    if (a.dim(), b.dim()) != (2, 3):
        return unknown(call)
    call.ledger.pin(call.labels(b).at(0), "chosen by data")
    _contract(call, a, 1, b, 1)
    return {0: call.labels(a).at(0), 1: _made(call, b, 2)}


@coupling_rule("aten.mv", reduces=True)
def mv(call: Call) -> Dims:
    """``(m, k) @ (k,)``."""
    a, b = call.args
    _contract(call, a, 1, b, 0)
    return {0: _made(call, a, 0)}


@coupling_rule("aten.dot", "aten.vdot", reduces=True)
def dot(call: Call) -> Dims:
    """``(k,) @ (k,)``."""
    _contract(call, call.args[0], 0, call.args[1], 0)
    return {}


@coupling_rule("aten.linear", reduces=True)
def linear(call: Call) -> Dims:
    """``(..., k), (n, k) -> (..., n)``, on backends that do not decompose it."""
    x, weight = call.args[:2]
    bias = call.argument("bias")
    _contract(call, x, x.dim() - 1, weight, 1)
    made = _made(call, weight, 0)
    if bias is not None:
        made = call.ledger.tie([made, call.labels(bias).at(0)], "bias of fixed size")
    last = x.dim() - 1
    dims = {dim: found for dim, found in call.labels(x).dims.items() if dim < last}
    return {**dims, last: made}


@coupling_rule("aten._trilinear", reduces=True)
def trilinear(call: Call) -> Dims:
    """Three tensors broadcast to each other, multiplied and summed over some dimensions: a bilinear layer."""
    summed = call.argument("sumdim")
    rank = call.args[0].dim() + len(call.args[3])
    operands = list(zip(call.args[:3], call.args[3:6], strict=True))  # each with the dimensions it is expanded along
    dims: Dims = {}
    for dim in range(rank):
        sides, of_weights = [], []
        for tensor, expanded in operands:
            if dim in expanded:
                continue
            own = dim - sum(other < dim for other in expanded)
            side = call.labels(tensor).at(own)
            sides.append(side)
            if call.labels(tensor).weight:
                of_weights.append(side)
        tied = call.ledger.tie(sides, "multiplied with a tensor of fixed size")
        for side in of_weights:
            call.ledger.use("consumer" if dim in summed else "producer", side)
        if dim not in summed:
            dims[dim - sum(gone < dim for gone in summed)] = tied
        elif not of_weights:
            call.ledger.mix(tied)
            call.ledger.use("contracted", tied)
    return dims


@coupling_rule("aten._euclidean_dist", "aten._cdist_forward", reduces=True)
def distances(call: Call) -> Dims:
    """``(..., m, k), (..., n, k) -> (..., m, n)``: distances between rows, a statistic over their entries."""
    a, b = call.args[:2]
    left, right = call.labels(a), call.labels(b)
    entries = call.ledger.tie([left.at(a.dim() - 1), right.at(b.dim() - 1)], "compared with a tensor of fixed size")
    call.ledger.mix(entries)
    call.ledger.use("contracted", entries)
    rank = call.out.dim()
    dims: Dims = {rank - 2: left.at(a.dim() - 2), rank - 1: right.at(b.dim() - 2)}
    for dim in range(rank - 2):  # batches, counted from the last
        sides = []
        for tensor in (a, b):
            own = dim - rank + tensor.dim()
            if own >= 0 and tensor.shape[own] > 1:
                sides.append(call.labels(tensor).at(own))
        if any(sides):
            dims[dim] = call.ledger.tie(sides, "compared with a tensor of fixed size")
    return dims


@coupling_rule("aten.embedding")
def embedding(call: Call) -> Dims:
    """The number of rows is pinned, since indices are data; their entries pass."""
    weight, indices = call.args[:2]
    call.ledger.pin(call.labels(weight).at(0), "rows are looked up by index")
    return {**call.labels(indices).dims, indices.dim(): _made(call, weight, 1)}


@coupling_rule("aten._embedding_bag", "aten._embedding_bag_forward_only", reduces=True)
def embedding_bag(call: Call) -> list[Dims]:
    """The number of rows is pinned, since indices are data; their entries pass."""
    weight = call.args[0]
    call.ledger.pin(call.labels(weight).at(0), "rows are looked up by index")
    for other in call.tensors()[1:]:
        for found in call.labels(other).dims.values():
            call.ledger.pin(found, "used as indices")
    made = _made(call, weight, 1)
    # The last output holds the row of each maximum, entry by entry, or is empty.
    return [{1: made}, {}, {}, {1: made} if call.out[3].dim() == 2 else {}]


@coupling_rule("aten.convolution", reduces=True)
def convolution(call: Call) -> Dims:
    """``(N, C, ...)`` with ``(O, C / groups, ...)``: channels are tied, batch passes, positions are pinned.

    Positions along which kernel and stride are 1 pass.
    """
    x, weight, bias = call.args[:3]
    transposed, groups = call.argument("transposed"), call.argument("groups")
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    labels, made = call.labels(x), call.labels(weight)
    passing = {}
    for dim in range(2, weight.dim()):
        if dim in made.dims:
            call.ledger.pin(made.at(dim), "kernel size")
        if dim in labels.dims and _one_by_one(call, dim):
            passing[dim] = labels.at(dim)
        elif dim in labels.dims:
            call.ledger.pin(labels.at(dim), "positions of a convolution")
    if groups == 1:
        _contract(call, x, 1, weight, in_dim)
        channels = _made(call, weight, out_dim)
    else:
        channels = _grouped(call, x, weight, groups, transposed)
    if bias is not None:
        channels = call.ledger.tie([channels, call.labels(bias).at(0)], "bias of fixed size")
    return {0: labels.at(0), 1: channels, **passing}


def _one_by_one(call: Call, dim: int) -> bool:
    """Return whether a convolution reads positions along a dimension one by one."""
    stride, padding, spread = (call.argument(name) for name in ("stride", "padding", "output_padding"))
    at = dim - 2
    alone = call.args[1].shape[dim] == 1 and stride[at % len(stride)] == 1
    return alone and padding[at % len(padding)] == 0 == spread[at % len(spread)]


def _grouped(call: Call, x: Tensor, weight: Tensor, groups: int, transposed: bool) -> tuple[Label, ...]:
    """Tie the channels of a grouped convolution: whole groups are pruned, or the same channels of every group.

    The weight is ``(O, I / groups, ...)``, or transposed ``(I, O / groups, ...)``: its dimension 0 holds the groups one
    after another, its dimension 1 is shared by all of them.
    """
    ledger, labels = call.ledger, call.labels(weight)
    stacked, shared = labels.at(0), labels.at(1)
    entering = call.labels(x).at(1)
    if labels.weight:
        makes, sums = (shared, stacked) if transposed else (stacked, shared)
        ledger.use("producer", makes)
        ledger.use("consumer", sums)
    if not (entering and stacked):
        ledger.pin((*entering, *stacked, *shared), "groups of a convolution whose input has fixed channels")
        return ()
    if labels.weight == call.labels(x).weight:  # neither or both are parameters: none alone can silence a term
        ledger.mix((*entering, *shared))
        ledger.use("contracted", (*entering, *shared))
    if transposed:
        entering = ledger.tie([entering, stacked], "")
    rows = np.stack([label.atoms.reshape(groups, -1) for label in entering], axis=-1)  # (groups, in each, labels)
    inputs, outputs = rows.reshape(groups, -1), stacked[0].atoms.reshape(groups, -1)
    if inputs.shape[1] == len(entering) and not (transposed and shared):  # depthwise: a group is a channel
        for column in inputs.T:  # of the labels of a choice, those of the alternative taken count
            ledger.meet(column[:, None], outputs)
        _follow_groups(call, entering)
        return stacked
    # Each block is a matrix of atoms, those of one column to be pruned together. If whole groups are pruned, the shared
    # dimension keeps its size. If the same channels of every group are, its entries are tied to those channels.
    alike = rows.transpose(0, 2, 1).reshape(-1, rows.shape[1])
    fixed = [np.append(label.atoms, PINNED)[:, None] for label in shared]
    shrinking = [label.atoms[None] for label in shared]
    if transposed:
        handed = ledger.choose("groups", {_OUTER: [inputs.T, *fixed], _INNER: [alike, *shrinking]})
        _follow_groups(call, handed[:1])
        return _transposed_outputs(handed, groups, weight.shape[1], len(fixed))
    whole = np.concatenate([inputs, outputs], axis=1).T
    inner = np.concatenate([alike, *shrinking])
    if (whole == whole[:, :1]).all():  # examples with kernels of their own: groups are alike, none can be pruned alone
        ledger.meet(outputs[:1], outputs[1:])
        for first in (*alike[: len(entering)], *shrinking):  # likewise
            ledger.meet(first, inner)
        return stacked
    handed = ledger.choose("groups", {_OUTER: [whole, *fixed], _INNER: [inner, outputs]})
    _follow_groups(call, handed[:1])
    return stacked


def _transposed_outputs(handed: Sequence[Label], groups: int, width: int, fixed: int) -> tuple[Label, ...]:
    """Return the output labels of a grouped transposed convolution, group after group, ``width`` channels each.

    ``handed`` are the labels of the choice: whole groups, ``fixed`` pinned ones, the channels of a group, and the
    shared dimension.
    """
    labels = [Label(np.repeat(handed[0].atoms, width), conditional=True)]
    for label in handed[fixed + 2 :]:
        labels.append(Label(np.tile(label.atoms, groups), conditional=True))
    return tuple(labels)


def _follow_groups(call: Call, labels: Sequence[Label]) -> None:
    """Record that the number of groups follows the labels that count them."""
    found = tuple(labels)
    call.ledger.count("groups", found)
    position = _GROUPS_AT.get(getattr(call.function, "__name__", ""))
    given = None if position is None else call.python_argument("groups", position)
    follow_argument(call, found, given, call.argument("groups"), "groups")


def _product(call: Call, a: Tensor, b: Tensor) -> Dims:
    """Return the labels of a matrix product, batched or not."""
    last = a.dim() - 1
    dims: Dims = {}
    for dim in range(last - 1):
        left, right = call.labels(a).at(dim), call.labels(b).at(dim)
        dims[dim] = call.ledger.tie([left, right], "batch of a product")
        call.ledger.prefer((*left, *right))  # attention heads, of which whole ones are pruned if possible
    _contract(call, a, last, b, last - 1)
    return {**dims, last - 1: _made(call, a, last - 1), last: _made(call, b, last)}


def _added(call: Call, addend: Tensor, dims: Dims) -> Dims:
    """Return the labels of a sum of an output and an addend that is broadcast to it."""
    for dim in range(call.out.dim()):
        own = dim - call.out.dim() + addend.dim()
        if own >= 0 and addend.shape[own] > 1 and call.out.shape[dim] > 1:
            dims[dim] = call.ledger.tie([dims.get(dim, ()), call.labels(addend).at(own)], "addend of fixed size")
    return dims


def _contract(call: Call, a: Tensor, a_dim: int, b: Tensor, b_dim: int) -> None:
    """Sum over a dimension that both tensors have."""
    left, right = call.labels(a), call.labels(b)
    tie_merged(call, [left.at(a_dim), right.at(b_dim)], "summed against a tensor of fixed size")
    for mine, other, dim in ((left, right, a_dim), (right, left, b_dim)):
        if mine.weight and not other.weight:
            call.ledger.use("consumer", mine.at(dim))
    if left.weight == right.weight:  # neither or both are parameters: none alone can silence a term
        call.ledger.mix(left.at(a_dim) + right.at(b_dim))
        call.ledger.use("contracted", left.at(a_dim) + right.at(b_dim))


def _made(call: Call, tensor: Tensor, dim: int) -> tuple[Label, ...]:
    """Return the labels that an operand gives to the output, which it produces if it is a weight."""
    labels = call.labels(tensor)
    if labels.weight:
        call.ledger.use("producer", labels.at(dim))
    return labels.at(dim)
