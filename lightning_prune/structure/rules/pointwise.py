"""Rules for element-wise operators: labels at the same element are tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__ = ["is_pointwise", "pointwise"]

_aten = torch.ops.aten
_UNTAGGED = frozenset({
    _aten.celu_, _aten.elu_, _aten.hardsigmoid_, _aten.hardtanh_, _aten.ldexp, _aten.leaky_relu, _aten.leaky_relu_,
    _aten.selu_,
})  # fmt: skip
"""Element-wise operators that torch 2.6 does not tag so."""


def is_pointwise(func: Any) -> bool:
    """Return whether an operator is known to be element-wise."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _UNTAGGED


@coupling_rule(
    "aten._prelu_kernel", "aten.masked_fill", "aten.masked_fill_", "aten.rrelu_with_noise",
    "aten.rrelu_with_noise_", "aten.tril", "aten.triu", "aten.nan_to_num", "aten.bernoulli", "aten.dropout",
    "aten.hardswish", "aten.hardswish_", "aten.log_sigmoid_forward", "aten.floor_divide", "aten.rsub", "aten.gelu_",
    "aten.threshold_", "aten.mish_", "aten.abs_",
)  # fmt: skip
def pointwise(call: Call) -> Dims | list[Dims]:
    """Labels along each dimension are tied; a tensor of fixed size pins them, unless its size is one (broadcast)."""
    out = call.out if isinstance(call.out, Tensor) else call.out[0]
    operands = [(tensor, call.labels(tensor)) for tensor in call.tensors() if tensor.dim()]
    if len(operands) == 1 and operands[0][0].dim() == out.dim():
        dims = operands[0][1].dims
    else:
        dims = {}
        for dim in range(out.dim()):
            sides = []
            for tensor, labels in operands:
                own = dim - out.dim() + tensor.dim()
                if own >= 0 and tensor.shape[own] > 1:
                    sides.append(labels.at(own))
            if any(sides):
                dims[dim] = call.ledger.tie(sides, "meets a tensor of fixed size")
    return call.each_output(dims)
