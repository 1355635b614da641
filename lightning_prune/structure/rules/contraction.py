"""Rules for operators that multiply and sum: matrix products, convolutions, embeddings."""

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
OUTER, INNER = "whole groups", "the same share of every group"


@coupling_rule("aten.mm", reduces=True)
def mm(call: Call) -> Dims:
    """``(m, k) @ (k, n)``: the summed dimension meets, the others pass."""
    return _product(call, call.args[0], call.args[1])


@coupling_rule("aten.addmm", "aten.baddbmm", reduces=True)
def addmm(call: Call) -> Dims:
    """A product, and an addend that meets it element by element."""
    addend, a, b = call.args[:3]
    return _added(call, addend, _product(call, a, b))


@coupling_rule("aten._sparse_addmm")
def sparse_addmm(call: Call) -> Dims:
    """A sparse matrix, whose entries lie where they lie, times ``(k, n)``: columns pass, rows keep their number."""
    addend, _, dense = call.args[:3]
    call.ledger.pin(call.labels(dense).at(0), "multiplied with a sparse tensor")
    dims = {1: _made(call, dense, 1)}
    # torch adds zeros as wide as the product by itself
    return dims if call.labels(addend).blank else _added(call, addend, dims)


@coupling_rule("aten.bmm", reduces=True)
def bmm(call: Call) -> Dims:
    """``(b, m, k) @ (b, k, n)``: the batch and the summed dimension meet, the others pass."""
    return _product(call, call.args[0], call.args[1])


@coupling_rule("aten._grouped_mm", reduces=True)
def grouped_mm(call: Call) -> Dims:
    """Rows ``(m, k)``, each with the one of the matrices ``(e, k, n)`` that data chose: so their number stays."""
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
    """``(..., k), (n, k) -> (..., n)``, on the backends that do not take it apart."""
    x, weight = call.args[:2]
    bias = call.argument("bias")
    _contract(call, x, x.dim() - 1, weight, 1)
    made = _made(call, weight, 0)
    if bias is not None:
        made = call.ledger.tie([made, call.labels(bias).at(0)], "bias of fixed size")
    return {**{d: f for d, f in call.labels(x).dims.items() if d < x.dim() - 1}, x.dim() - 1: made}


@coupling_rule("aten._trilinear", reduces=True)
def trilinear(call: Call) -> Dims:
    """Three tensors, stretched over each other's dimensions, multiplied and summed over some: a bilinear layer."""
    summed = call.argument("sumdim")
    rank = call.args[0].dim() + len(call.args[3])
    own = [[dim for dim in range(rank) if dim not in stretched] for stretched in call.args[3:6]]
    dims: Dims = {}
    for dim in range(rank):
        sides = [
            (labels.weight, labels.at(has.index(dim)))
            for labels, has in zip(map(call.labels, call.args[:3]), own, strict=True)
            if dim in has
        ]
        tied = call.ledger.tie([side for _, side in sides], "multiplied with a tensor of fixed size")
        for weight, side in sides:
            if weight:
                call.ledger.use("consumer" if dim in summed else "producer", side)
        if dim not in summed:
            dims[dim - sum(gone < dim for gone in summed)] = tied
        elif not any(weight for weight, _ in sides):
            call.ledger.mix(tied)
    return dims


@coupling_rule("aten.embedding")
def embedding(call: Call) -> Dims:
    """Rows are looked up by data, so their number is fixed; their entries pass."""
    weight, indices = call.args[:2]
    call.ledger.pin(call.labels(weight).at(0), "rows are looked up by index")
    return {**call.labels(indices).dims, indices.dim(): _made(call, weight, 1)}


@coupling_rule("aten._embedding_bag", "aten._embedding_bag_forward_only", reduces=True)
def embedding_bag(call: Call) -> list[Dims]:
    """Rows are looked up by data and summed, so their number is fixed; their entries pass."""
    weight = call.args[0]
    call.ledger.pin(call.labels(weight).at(0), "rows are looked up by index")
    for other in call.tensors()[1:]:
        for found in call.labels(other).dims.values():
            call.ledger.pin(found, "used as indices")
    made = _made(call, weight, 1)
    # the last output names the rows that a maximum came from, entry by entry, or is empty
    return [{1: made}, {}, {}, {1: made} if call.out[3].dim() == 2 else {}]


@coupling_rule("aten.convolution", reduces=True)
def convolution(call: Call) -> Dims:
    """``(N, C, ...)`` with ``(O, C / groups, ...)``: channels meet, batch passes, positions keep their number.

    Positions that the kernel takes one by one pass.
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
    stride, padding, spread = (call.argument(name) for name in ("stride", "padding", "output_padding"))
    at = dim - 2
    alone = call.args[1].shape[dim] == 1 and stride[at % len(stride)] == 1
    return alone and padding[at % len(padding)] == 0 == spread[at % len(spread)]


def _grouped(call: Call, x: Tensor, weight: Tensor, groups: int, transposed: bool) -> tuple[Label, ...]:
    """Let the channels of a grouped convolution meet: either whole groups leave, or every group shrinks alike.

    The weight is ``(O, I / groups, ...)``, or transposed ``(I, O / groups, ...)``: its dimension 0 holds the groups one
    after another, its dimension 1 is shared by all of them.
    """
    ledger, labels = call.ledger, call.labels(weight)
    stacked, shared = labels.at(0), labels.at(1)
    entering = call.labels(x).at(1)
    if labels.weight:
        ledger.use("consumer" if transposed else "producer", stacked)
        ledger.use("producer" if transposed else "consumer", shared)
    if not (entering and stacked):
        ledger.pin((*entering, *stacked, *shared), "groups of a convolution whose input has fixed channels")
        return ()
    if labels.weight == call.labels(x).weight:  # no one parameter to silence the sum with
        ledger.mix((*entering, *shared))
    if transposed:
        entering = ledger.tie([entering, stacked], "")
    rows = np.stack([label.atoms.reshape(groups, -1) for label in entering], axis=-1)  # (groups, in each, labels)
    inputs, outputs = rows.reshape(groups, -1), stacked[0].atoms.reshape(groups, -1)
    if inputs.shape[1] == len(entering) and not (transposed and shared):  # depthwise: a group is a channel
        ledger.meet(inputs[:, :1], outputs)
        ledger.meet(inputs[:, :1], inputs)
        _follow_groups(call, entering)
        return stacked
    alike = rows.transpose(0, 2, 1).reshape(-1, rows.shape[1])
    fixed = [np.append(label.atoms, PINNED)[:, None] for label in shared]
    if transposed:
        ways = {OUTER: [inputs.T, *fixed], INNER: [alike, *(label.atoms[None] for label in shared)]}
    else:
        whole = np.concatenate([inputs, outputs], axis=1).T
        if (whole == whole[:, :1]).all():  # examples with kernels of their own: groups are alike, none can leave alone
            for block in (np.concatenate([alike, *(s.atoms[None] for s in shared)]), outputs):
                ledger.meet(block[:1], block[1:])
            return stacked
        ways = {OUTER: [whole, *fixed], INNER: [np.concatenate([alike, *(s.atoms[None] for s in shared)]), outputs]}
    handed = ledger.choose("groups", ways)
    _follow_groups(call, handed[:1])
    if not transposed:
        return stacked
    every = [Label(np.repeat(handed[0].atoms, weight.shape[1]), conditional=True)]
    return (*every, *(Label(np.tile(label.atoms, groups), conditional=True) for label in handed[len(fixed) + 2 :]))


def _follow_groups(call: Call, labels: Sequence[Label]) -> None:
    found = tuple(labels)
    call.ledger.count("groups", found)
    position = _GROUPS_AT.get(getattr(call.function, "__name__", ""))
    given = None if position is None else call.python_argument("groups", position)
    follow_argument(call, found, given, call.argument("groups"), "groups")


def _product(call: Call, a: Tensor, b: Tensor) -> Dims:
    last = a.dim() - 1
    batch = range(last - 1)
    tied = {
        dim: call.ledger.tie([call.labels(a).at(dim), call.labels(b).at(dim)], "batch of a product") for dim in batch
    }
    for dim in batch:
        call.ledger.prefer((*call.labels(a).at(dim), *call.labels(b).at(dim)))
    _contract(call, a, last, b, last - 1)
    return {**tied, last - 1: _made(call, a, last - 1), last: _made(call, b, last)}


def _added(call: Call, addend: Tensor, dims: Dims) -> Dims:
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
    if left.weight == right.weight:  # no one parameter to silence the sum with
        call.ledger.mix(left.at(a_dim) + right.at(b_dim))


def _made(call: Call, tensor: Tensor, dim: int) -> tuple[Label, ...]:
    """Return the labels that an operand gives to the output, which it produces if it is a weight."""
    labels = call.labels(tensor)
    if labels.weight:
        call.ledger.use("producer", labels.at(dim))
    return labels.at(dim)
