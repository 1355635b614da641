"""Rules for operators that normalise: channels meet their statistics and their affine parameters."""

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
    """Each channel has statistics and affine parameters of its own."""
    x = call.args[0]
    labels = call.labels(x)
    own = [tensor for tensor in call.tensors()[1:] if tensor.dim() == 1]
    channels = call.ledger.tie([labels.at(1), *(call.labels(t).at(0) for t in own)], "normalised by fixed statistics")
    if call.has("training") and call.argument("training"):
        for dim, found in labels.dims.items():
            if dim != 1:
                call.ledger.mix(found)
    return [{**labels.dims, 1: channels}] + [{}] * (len(call.out) - 1)


@coupling_rule("aten.native_layer_norm", "aten._fused_rms_norm", reduces=True)
def layer_norm(call: Call) -> list[Dims]:
    """The last dimensions share one statistic, and meet the affine parameters entry by entry."""
    x, shape = call.args[:2]
    first = x.dim() - len(shape)
    labels, affine = call.labels(x), [tensor for tensor in call.tensors()[1:] if tensor.dim()]
    dims = dict(labels.dims)
    for entry in range(len(shape)):
        dims[first + entry] = call.ledger.tie(
            [labels.at(first + entry), *(call.labels(t).at(entry) for t in affine)], "normalised by fixed parameters"
        )
        call.ledger.mix(dims[first + entry])
        if dims[first + entry]:
            _follow_shape(call, dims[first + entry], shape, entry)
    return [dims] + [{}] * (len(call.out) - 1)


def _follow_shape(call: Call, found: tuple[Label, ...], shape: Sequence[int], entry: int) -> None:
    """Let an entry of the shape that a norm was asked for follow the labels along that dimension."""
    given = call.python_argument("normalized_shape", 1)
    number = given[entry] if isinstance(given, list | tuple) and len(given) == len(shape) else None
    path, module = call.module
    handed_on = hands_on(call, module) and tuple(shape) == getattr(module, "normalized_shape", None)
    if handed_on and not isinstance(number, Number):
        call.ledger.attributes.append(Attribute(path, "normalized_shape", found, entry))
    else:
        follow_argument(call, found, number, shape[entry], "normalized_shape")


def _follow_normalized(call: Call) -> None:
    """Let the shape that an RMS norm was asked for follow: torch takes it apart, and no operator takes that shape."""
    x = call.args[0]
    given = call.python_argument("normalized_shape", 1)
    shape = [given] if isinstance(given, int) else list(given or ())
    for entry in range(len(shape)):
        if found := call.labels(x).at(x.dim() - len(shape) + entry):
            _follow_shape(call, found, shape, entry)


@coupling_rule("aten.pow")
def power(call: Call) -> Dims | list[Dims]:
    """Element by element; an RMS norm, which torch takes apart, begins with it."""
    if getattr(call.function, "__name__", "") == "rms_norm":
        _follow_normalized(call)
    return pointwise(call)


@coupling_rule("aten._weight_norm_interface", reduces=True)
def weight_norm(call: Call) -> list[Dims]:
    """A weight divided by its norm over all dimensions but one, along which it is scaled."""
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
    """Channels of one group share a statistic: whole groups leave, or every group shrinks alike."""
    x, groups = call.args[0], call.args[6]
    labels = call.labels(x)
    affine = [call.labels(tensor).at(0) for tensor in call.args[1:3] if tensor is not None]
    channels = call.ledger.tie([labels.at(1), *affine], "normalised by fixed parameters")
    call.ledger.mix(channels)
    for dim, found in labels.dims.items():
        if dim > 1:
            call.ledger.mix(found)
    if channels and groups > 1:
        columns = np.concatenate([label.atoms.reshape(groups, -1).T for label in channels])
        if x.shape[1] == groups:
            _follow(call, channels)
        else:
            alike = np.concatenate([label.atoms.reshape(groups, -1) for label in channels])
            whole, _ = call.ledger.choose(
                "groups", {"whole groups": [columns], "the same share of every group": [alike]}
            )
            _follow(call, (whole,))
    return [{**labels.dims, 1: channels}] + [{}] * (len(call.out) - 1)


def _follow(call: Call, labels: tuple[Label, ...]) -> None:
    call.ledger.count("group", labels)
    native = getattr(call.function, "__name__", "") == "native_group_norm"
    given = call.python_argument("group", 6) if native else call.python_argument("num_groups", 1)
    follow_argument(call, labels, given, call.args[6], "num_groups")


@coupling_rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax", reduces=True)
def softmax(call: Call) -> Dims:
    """Shares of a sum: they grow when some of them leave."""
    x = call.args[0]
    labels = call.labels(x)
    call.ledger.mix(labels.at(call.argument("dim") % max(x.dim(), 1)))
    return labels.dims


@coupling_rule(
    "aten._fused_moving_avg_obs_fq_helper", "aten._fused_moving_avg_obs_fq_helper_functional", reduces=True
)  # fmt: skip
def observed(call: Call) -> list[Dims]:
    """Rounding, with the least and the largest number seen as bounds: of all entries, or of each channel's."""
    x = call.args[0]
    labels, dims = call.labels(x), dict(call.labels(x).dims)
    axis = call.argument("ch_axis") % x.dim() if call.argument("per_row_fake_quant") else -1
    if axis in dims:
        bounds = [tensor for tensor in call.args[3:7] if tensor.numel() > 1]
        dims[axis] = call.ledger.tie([labels.at(axis), *(call.labels(t).at(0) for t in bounds)], "rounded per channel")
    for dim, found in labels.dims.items():
        if dim != axis:
            call.ledger.mix(found)
    return [dims, dims] + [{}] * (len(call.out) - 2)
