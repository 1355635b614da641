"""Rules for losses: element-wise with ``reduction="none"``, else a statistic over all entries."""

from __future__ import annotations

from lightning_prune.structure.rules.pointwise import pointwise
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []

_NONE = 0
"""``reduction="none"``, as operators receive it."""


@coupling_rule(
    "aten.mse_loss", "aten.huber_loss", "aten.smooth_l1_loss", "aten.binary_cross_entropy", "aten.soft_margin_loss",
    "aten.binary_cross_entropy_with_logits",
    reduces=True,
)  # fmt: skip
def loss(call: Call) -> Dims | list[Dims]:
    """Compared entries are tied; the sum or mean changes when some of them are pruned."""
    if call.argument("reduction") == _NONE:
        return pointwise(call)
    operands = [tensor for tensor in call.tensors() if tensor.dim()]
    rank = max(tensor.dim() for tensor in operands)
    for dim in range(rank):
        sides = []
        for tensor in operands:
            own = dim - rank + tensor.dim()  # the same dimension, counted from the last
            if own >= 0 and tensor.shape[own] > 1:
                sides.append(call.labels(tensor).at(own))
        if any(sides):
            tied = call.ledger.tie(sides, "compared with a tensor of fixed size")
            call.ledger.mix(tied)
            call.ledger.use("reduced", tied)
    return {}


@coupling_rule("aten.nll_loss_forward", "aten.nll_loss2d_forward", reduces=True)
def nll_loss(call: Call) -> list[Dims]:
    """``(N, C, ...)`` and targets ``(N, ...)``: classes, chosen by data, are pinned; the others are tied."""
    x, target, weight = call.args[:3]
    labels = call.labels(x)
    classes = 1 if x.dim() > 2 else x.dim() - 1
    chosen = () if weight is None else call.labels(weight).at(0)
    call.ledger.pin((*labels.at(classes), *chosen), "classes are chosen by data")
    dims: Dims = {}
    for dim in range(target.dim()):
        along = dim + 1  # positions come after the classes in x
        if x.dim() > target.dim() and dim < classes:
            along = dim  # examples come before them
        sides = [labels.at(along), call.labels(target).at(dim)]
        if any(sides):
            dims[dim] = call.ledger.tie(sides, "compared with a tensor of fixed size")
    if call.argument("reduction") == _NONE:
        return [dims, {}]
    for found in dims.values():
        call.ledger.mix(found)
        call.ledger.use("reduced", found)
    return [{}, {}]
