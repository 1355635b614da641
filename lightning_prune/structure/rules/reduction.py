"""Rules for reductions, cumulative sums and sorting."""

from __future__ import annotations

import torch

from lightning_prune.structure.rules.pointwise import pointwise
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []

_EXTREMES = (torch.ops.aten.max.dim, torch.ops.aten.min.dim)


@coupling_rule(
    "aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.sort", "aten.topk", "aten.cummax", "aten.cummin"
)
def along_one_dimension(call: Call) -> Dims | list[Dims]:
    """Order matters along the dimension, so it is pinned; the others pass."""
    x = call.args[0]
    dim = call.argument("dim") % max(x.dim(), 1)
    labels = call.labels(x)
    call.ledger.pin(labels.at(dim), f"order matters in {call.func.overloadpacket}")
    dims = {d: found for d, found in labels.dims.items() if d != dim}
    return call.each_output(dims)


@coupling_rule(
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.linalg_vector_norm", "aten.norm",
    "aten.prod",
    "aten.logsumexp", "aten.any", "aten.all", "aten.var_mean", "aten.std_mean", "aten.nansum", "aten.count_nonzero",
    "aten.aminmax", "aten._is_all_true", "aten._is_any_true",
    reduces=True,
)  # fmt: skip
def reduction(call: Call) -> Dims | list[Dims]:
    """Statistics over reduced dimensions change when entries are pruned; the other dimensions pass."""
    return _reduced(call, ordered=False)


@coupling_rule(
    "aten.max", "aten.min", "aten.argmax", "aten.argmin", "aten.median", "aten.mode", "aten.kthvalue", reduces=True
)
def ordered_reduction(call: Call) -> Dims | list[Dims]:
    """The result holds positions, so the reduced dimension is pinned; with a maximum or minimum, once they are used."""
    if call.func._overloadname == "other":  # max(a, b) is element by element
        return pointwise(call)
    if call.func in _EXTREMES:
        call.positions_along = call.labels(call.args[0]).at(call.argument("dim") % max(call.args[0].dim(), 1))
        return _reduced(call, ordered=False)
    return _reduced(call, ordered=call.func._overloadname != "default" or "arg" in str(call.func))


def _reduced(call: Call, ordered: bool) -> Dims | list[Dims]:
    x = call.args[0]
    labels = call.labels(x)
    given = call.argument("dim") if call.has("dim") else None
    reduced = [given] if isinstance(given, int) else given or range(x.dim())
    gone = {dim % max(x.dim(), 1) for dim in reduced}
    keepdim = bool(call.has("keepdim") and call.argument("keepdim"))
    dims: Dims = {}
    for dim in range(x.dim()):
        found = labels.at(dim)
        if dim not in gone:
            removed_before = 0 if keepdim else sum(g < dim for g in gone)
            dims[dim - removed_before] = found
        elif ordered:
            call.ledger.pin(found, f"positions matter in {call.func.overloadpacket}")
        else:
            call.ledger.mix(found)
            call.ledger.use("reduced", found)
    return call.each_output(dims)
