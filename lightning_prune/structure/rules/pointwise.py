"""Rules for element-wise operators: labels at the same element are tied."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__ = ["pointwise"]


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
    return dims if isinstance(call.out, Tensor) else [dims] * len(call.out)
