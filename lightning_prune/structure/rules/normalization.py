"""Rules for normalisation layers, softmax and observers: channels are tied to statistics and affine parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_prune.structure.labels import Attribute, Label
from lightning_prune.structure.rules.frozen_sizes import follow_argument, hands_on
from lightning_prune.structure.rules.pointwise import pointwise
from lightning_prune.structure.rules.table import Call, Dims, coupling_rule
from lightning_prune.structure.traced_ints import Number

__all__: list[str] = []


@coupling_rule(
    "aten.native_batch_norm", "aten.cudnn_batch_norm", "aten.miopen_batch_norm", "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training", "aten._batch_norm_no_update", "aten._batch_norm_with_update",
    reduces=True,
)  # fmt: skip
def batch_norm(call: Call) -> list[Dims]:
    """Channels are tied to their statistics and affine parameters."""
    x = call.args[0]
    labels = call.labels(x)
    own = [tensor for tensor in call.tensors()[1:] if tensor.dim() == 1]
    sides = [labels.at(1)]
    sides += [call.labels(tensor).at(0) for tensor in own]
    channels = call.ledger.tie(sides, "normalised by fixed statistics")
    if call.has("training") and call.argument("training"):
        for dim, found in labels.dims.items():
            if dim != 1:
                call.ledger.mix(found)
    return [{**labels.dims, 1: channels}] + [{}] * (len(call.out) - 1)


@coupling_rule("aten.native_layer_norm", "aten._fused_rms_norm", reduces=True)
def layer_norm(call: Call) -> list[Dims]:
    """The last dimensions share one statistic, and are tied to the affine parameters entry by entry."""
    x, shape = call.args[:2]
    first = x.dim() - len(shape)
    labels, affine = call.labels(x), [tensor for tensor in call.tensors()[1:] if tensor.dim()]
    dims = dict(labels.dims)
    for entry in range(len(shape)):
        sides = [labels.at(first + entry)]
        sides += [call.labels(tensor).at(entry) for tensor in affine]
        tied = call.ledger.tie(sides, "normalised by fixed parameters")
        call.ledger.mix(tied)
        if tied:
            _follow_shape(call, tied, shape, entry)
        dims[first + entry] = tied
    return [dims] + [{}] * (len(call.out) - 1)


def _follow_shape(call: Call, found: tuple[Label, ...], shape: Sequence[int], entry: int) -> None:
    """Record that an entry of ``normalized_shape`` follows the labels along its dimension."""
    given = call.python_argument("normalized_shape", 1)
    number = given[entry] if isinstance(given, list | tuple) and len(given) == len(shape) else None
    path, module = call.module
    handed_on = hands_on(call, module) and tuple(shape) == getattr(module, "normalized_shape", None)
    if handed_on and not isinstance(number, Number):
        call.ledger.attributes.append(Attribute(path, "normalized_shape", found, entry))
    else:
        follow_argument(call, found, number, shape[entry], "normalized_shape")


def _follow_normalized(call: Call) -> None:
    """Record what ``normalized_shape`` of an RMS norm follows: torch decomposes it, and no operator takes the shape."""
    x = call.args[0]
    given = call.python_argument("normalized_shape", 1)
    shape = [given] if isinstance(given, int) else list(given or ())
    for entry in range(len(shape)):
        if found := call.labels(x).at(x.dim() - len(shape) + entry):
            _follow_shape(call, found, shape, entry)


@coupling_rule("aten.pow")
def power(call: Call) -> Dims | list[Dims]:
    """Element-wise; the first operator of an RMS norm, which torch decomposes."""
    if getattr(call.function, "__name__", "") == "rms_norm":
        _follow_normalized(call)
    return pointwise(call)


@coupling_rule("aten._weight_norm_interface", reduces=True)
def weight_norm(call: Call) -> list[Dims]:
    """The scale is tied to the one dimension that norms do not run over."""
    weight, scale = call.args[:2]
    dim = call.argument("dim") % weight.dim()
    labels = call.labels(weight)
    scaled = call.ledger.tie([labels.at(dim), call.labels(scale).at(dim)], "scaled by a tensor of fixed size")
    for other, found in labels.dims.items():
        if other != dim:
            call.ledger.mix(found)
    return [{**labels.dims, dim: scaled}, {}]


@coupling_rule("aten.native_group_norm", reduces=True)
def group_norm(call: Call) -> list[Dims]:
    """Channels of one group share a statistic: whole groups are pruned, or the same share of every group."""
    x, groups = call.args[0], call.args[6]
    labels = call.labels(x)
    affine = [call.labels(tensor).at(0) for tensor in call.args[1:3] if tensor is not None]
    channels = call.ledger.tie([labels.at(1), *affine], "normalised by fixed parameters")
    call.ledger.mix(channels)
    for dim, found in labels.dims.items():
        if dim > 1:
            call.ledger.mix(found)
    if channels and x.shape[1] == groups > 1:  # a group is a channel
        _follow(call, channels)
    elif channels and groups > 1:
        by_group = [label.atoms.reshape(groups, -1) for label in channels]
        columns = np.concatenate([atoms.T for atoms in by_group])
        alike = np.concatenate(by_group)
        whole, _ = call.ledger.choose("groups", {"whole groups": [columns], "the same share of every group": [alike]})
        _follow(call, (whole,))
    return [{**labels.dims, 1: channels}] + [{}] * (len(call.out) - 1)


def _follow(call: Call, labels: tuple[Label, ...]) -> None:
    """Record that the number of groups follows the labels that count them."""
    call.ledger.count("group", labels)
    native = getattr(call.function, "__name__", "") == "native_group_norm"
    given = call.python_argument("group", 6) if native else call.python_argument("num_groups", 1)
    follow_argument(call, labels, given, call.args[6], "num_groups")


@coupling_rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", reduces=True)
def softmax(call: Call) -> Dims:
    """Labels pass; the others grow when entries along the dimension are pruned."""
    x = call.args[0]
    labels = call.labels(x)
    call.ledger.mix(labels.at(call.argument("dim") % max(x.dim(), 1)))
    return labels.dims


@coupling_rule(
    "aten._fused_moving_avg_obs_fq_helper", "aten._fused_moving_avg_obs_fq_helper_functional", reduces=True
)  # fmt: skip
def observed(call: Call) -> list[Dims]:
    """Fake quantisation with observed bounds, of all entries or of each channel."""
    x = call.args[0]
    labels, dims = call.labels(x), dict(call.labels(x).dims)
    axis = call.argument("ch_axis") % x.dim() if call.argument("per_row_fake_quant") else -1
    if axis in dims:
        bounds = [tensor for tensor in call.args[3:7] if tensor.numel() > 1]
        sides = [labels.at(axis)]
        sides += [call.labels(tensor).at(0) for tensor in bounds]
        dims[axis] = call.ledger.tie(sides, "rounded per channel")
    for dim, found in labels.dims.items():
        if dim != axis:
            call.ledger.mix(found)
    return [dims, dims] + [{}] * (len(call.out) - 2)
