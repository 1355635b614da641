"""Counts the multiply-adds of each operator, as fvcore does; knows no model and no channel group.

An operator that is not in the table costs nothing, nor does one that no output depends on. Sizes are labels where
channels run, so that the cost can be worked out again for other widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lightning_prune.structure.labels import Labels, Ledger
from lightning_prune.structure.rules.table import Call

__all__ = ["COSTS", "CostRule", "cost_rule", "drop_unneeded_"]

CostRule = Callable[[Call], None]
"""Given a call whose outputs have their labels, writes down its multiply-adds."""

COSTS: dict[str, CostRule] = {}
"""Operator, as in ``torch.ops`` -> its rule."""


def drop_unneeded_(ledger: Ledger, outputs: Iterable[Labels]) -> None:
    """Drop the costs of operators that no tensor among the outputs depends on.

    What writes into a tensor counts, since views of that tensor may be among the outputs.
    """
    wanted = {id(labels) for labels in outputs}
    for at in reversed(range(len(ledger.ran))):
        ran = ledger.ran[at]
        if not wanted.isdisjoint(map(id, ran.made)) or ran.func._schema.is_mutable:
            ledger.needed.add(at)
            wanted.update(map(id, ran.taken))
    ledger.costs = [cost for cost in ledger.costs if cost.at in ledger.needed]


def cost_rule(func: Any) -> CostRule | None:
    """Return the rule of an operator, or None where it costs nothing."""
    return COSTS.get(str(func.overloadpacket))


def _costs(*operators: str) -> Callable[[CostRule], CostRule]:
    def register(rule: CostRule) -> CostRule:
        COSTS.update(dict.fromkeys(operators, rule))
        return rule

    return register


# Products


@_costs("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", "aten._grouped_mm", "aten._int_mm")
def product(call: Call) -> None:
    """Every entry of the output sums over the last dimension of the first factor."""
    call.cost("matmul", 1, *call.sizes(call.out), *call.sizes(call.args[0], -1))


@_costs("aten.addmm", "aten.baddbmm", "aten.addmv", "aten._addmm_activation", "aten._sparse_addmm")
def product_and_addend(call: Call) -> None:
    """The addend comes first, and costs nothing."""
    call.cost("matmul", 1, *call.sizes(call.out), *call.sizes(call.args[1], -1))


@_costs("aten.addbmm")
def sum_of_products(call: Call) -> None:
    """The products of a batch are added up."""
    call.cost("matmul", 1, *call.sizes(call.args[1]), *call.sizes(call.args[2], -1))


@_costs("aten.linear")
def linear(call: Call) -> None:
    """``(..., k), (n, k) -> (..., n)``."""
    call.cost("linear", 1, *call.sizes(call.out), *call.sizes(call.args[0], -1))


@_costs("aten._cdist_forward", "aten._euclidean_dist")
def distances(call: Call) -> None:
    """Every distance sums over the coordinates."""
    call.cost("cdist", 1, *call.sizes(call.out), *call.sizes(call.args[0], -1))


@_costs("aten._trilinear")
def bilinear(call: Call) -> None:
    """The first input times the weight, and what that gives times the second."""
    x, weight = call.args[:2]
    call.cost("bilinear", 1, *call.sizes(x, 0), *call.sizes(weight))
    call.cost("bilinear", 1, *call.sizes(x, 0), *call.sizes(weight, 0, 2))


@_costs(
    "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention", "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def fused_attention(call: Call) -> None:
    """Queries times keys, and weights times values; a trace sees this only where the model asks for such a kernel."""
    query, key, value = call.args[:3]
    pairs = [*call.sizes(query, *range(query.dim() - 1)), *call.sizes(key, -2)]
    call.cost("scaled_dot_product_attention", 1, *pairs, *call.sizes(key, -1))
    call.cost("scaled_dot_product_attention", 1, *pairs, *call.sizes(value, -1))


# Convolutions


@_costs("aten.convolution")
def convolution(call: Call) -> None:
    """The weight is used once at every position: of the output, or of the input where it is transposed."""
    x, weight = call.args[:2]
    where = x if call.argument("transposed") else call.out
    batch = call.sizes(x, 0)
    positions = call.sizes(where, *range(2, where.dim())) if where.dim() > 2 else []
    call.cost("conv", math.prod(weight.shape[2:]), *batch, *call.sizes(weight, 0, 1), *positions)


@_costs("aten.conv_tbc")
def convolution_over_time(call: Call) -> None:
    """``(T, B, C)`` with a weight ``(K, C, O)``."""
    weight = call.args[1]
    call.cost("conv_tbc", weight.shape[0], *call.sizes(call.out), *call.sizes(weight, 1))


@_costs("torchvision.deform_conv2d")
def deformed_convolution(call: Call) -> None:
    """As a convolution; where each tap looks costs nothing."""
    call.cost("deform_conv2d", 1, *call.sizes(call.out), *call.sizes(call.args[1], 1, 2, 3))


# Normalisation, by the entry


@_costs(
    "aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm", "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update", "aten._batch_norm_with_update",
)  # fmt: skip
def batch_norm(call: Call) -> None:
    """A shift and a scale, with known statistics; torch makes an instance norm of it, too."""
    affine = call.args[1] is not None
    if _within(call, "instance_norm", nn.modules.instancenorm._InstanceNorm):
        call.cost("instance_norm", 5 if affine else 4, *call.sizes(call.args[0]))
    elif call.has("training") and call.argument("training"):
        call.cost("batch_norm", 5 if affine else 4, *call.sizes(call.args[0]))
    else:
        call.cost("batch_norm", 2 if affine else 1, *call.sizes(call.args[0]))


@_costs("aten.native_layer_norm")
def layer_norm(call: Call) -> None:
    """Mean, variance, shift and scale."""
    call.cost("layer_norm", 4 if call.args[2] is None else 5, *call.sizes(call.args[0]))


@_costs("aten.native_group_norm")
def group_norm(call: Call) -> None:
    """Mean, variance, shift and scale."""
    call.cost("group_norm", 4 if call.args[1] is None else 5, *call.sizes(call.args[0]))


@_costs("aten._fused_rms_norm")
def rms_norm(call: Call) -> None:
    """As a layer norm, without the mean and its subtraction."""
    call.cost("rms_norm", 2 if call.args[2] is None else 3, *call.sizes(call.args[0]))


@_costs("aten.pow")
def rms_norm_in_steps(call: Call) -> None:
    """Torch takes an RMS norm apart, and this is its first step; any other power costs nothing."""
    if not _within(call, "rms_norm", nn.RMSNorm):
        return
    module = call.module[1]
    weight = module.weight if isinstance(module, nn.RMSNorm) else call.python_argument("weight", 2)
    call.cost("rms_norm", 2 if weight is None else 3, *call.sizes(call.args[0]))


# Pooling and resampling


@_costs("aten._adaptive_avg_pool2d")
def adaptive_pooling(call: Call) -> None:
    """Every entry of the input is added to a mean."""
    if _within(call, "adaptive_avg_pool2d", nn.AdaptiveAvgPool2d):
        call.cost("adaptive_avg_pool2d", 1, *call.sizes(call.args[0]))


@_costs("aten.mean")
def global_pooling(call: Call) -> None:
    """Torch turns global average pooling into a mean; a mean that was asked for costs nothing."""
    if call.args[0].dim() > 2 and _within(call, "adaptive_avg_pool2d", nn.AdaptiveAvgPool2d):
        call.cost("adaptive_avg_pool2d", 1, *call.sizes(call.args[0]))


@_costs(
    "aten.upsample_linear1d", "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d",
    "aten.upsample_trilinear3d", "aten.grid_sampler_2d", "aten.grid_sampler_3d", "aten.cudnn_grid_sampler",
)  # fmt: skip
def resampling(call: Call) -> None:
    """As many per entry of the output as there are neighbours."""
    name = call.func._opname
    call.cost(name, _NEIGHBOURS.get(name, 4), *call.sizes(call.out))


_NEIGHBOURS = {
    "upsample_linear1d": 2, "upsample_nearest2d": 1, "upsample_bicubic2d": 16, "upsample_trilinear3d": 8,
}  # fmt: skip


def _within(call: Call, function: str, kind: type[nn.Module]) -> bool:
    """Return whether the operator is a part of what a Python function does, by name or by the module that runs."""
    if call.function is None:
        return isinstance(call.module[1], kind)
    return getattr(call.function, "__name__", "") == function
