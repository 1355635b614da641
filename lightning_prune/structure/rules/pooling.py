"""Rules for pooling and resampling: channels pass, positions are pinned."""

from __future__ import annotations

from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []


_PER_RANK = (
    "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest", "upsample_linear",
    "upsample_bilinear", "upsample_trilinear", "upsample_bicubic", "fractional_max_pool", "_upsample_nearest_exact",
    "_upsample_bilinear_aa_", "max_unpool",
)  # fmt: skip
"""Operators that end in ``1d``, ``2d`` or ``3d``."""


@coupling_rule(
    *(f"aten.{name}1d" for name in _PER_RANK), *(f"aten.{name}2d" for name in _PER_RANK),
    *(f"aten.{name}3d" for name in _PER_RANK),
    "aten.max_pool1d", "aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices", "aten.max_pool2d",
    "aten.mkldnn_max_pool2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa", "aten.grid_sampler_2d",
    "aten.grid_sampler_3d",
)  # fmt: skip
def spatial(call: Call) -> Dims | list[Dims]:
    """Batch and channels pass; positions are pinned, unless the window takes them one by one."""
    x = call.args[0]
    labels = call.labels(x)
    name = call.func._opname
    positions = int(next(c for c in name if c.isdigit()))
    dims: Dims = {}
    for dim, found in labels.dims.items():
        if dim < x.dim() - positions or _one_by_one(call, dim - x.dim() + positions):
            dims[dim] = found
        else:
            call.ledger.pin(found, f"positions of {name}")
    for other in call.tensors()[1:]:
        for dim, found in call.labels(other).dims.items():
            if name.startswith("max_unpool") and dim in dims:
                continue
            call.ledger.pin(found, f"positions of {name}")
    if name.startswith("max_unpool"):  # the indices, channel by channel, say where each entry goes
        indices = call.labels(call.args[1])
        for dim, found in dims.items():
            dims[dim] = call.ledger.tie([found, indices.at(dim)], name)
    return call.each_output(dims)


def _one_by_one(call: Call, place: int) -> bool:
    """Return whether the window covers every position by itself."""
    if not call.has("kernel_size") or not call.has("stride"):
        return False
    kernel = call.argument("kernel_size")
    stride = call.argument("stride") or kernel  # torch's default
    padding = call.argument("padding") or (0,)
    size, step, pad = (values[place % len(values)] for values in (kernel, stride, padding))
    return (size, step, pad) == (1, 1, 0)
