"""Rules for pooling and resampling: channels pass, positions keep their number."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.structure.rules.table import Call, Dims, coupling_rule

__all__: list[str] = []


@coupling_rule(
    *(
        f"aten.{name}{n}d"
        for n in (1, 2, 3)
        for name in (
            "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest",
            "upsample_linear",
            "upsample_bilinear", "upsample_trilinear", "upsample_bicubic", "fractional_max_pool",
            "_upsample_nearest_exact",
            "_upsample_bilinear_aa_", "max_unpool",
        )
    ),
    "aten.max_pool1d", "aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices", "aten.max_pool2d",
    "aten.mkldnn_max_pool2d",
    "aten.upsample_bilinear2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa", "aten.grid_sampler_2d",
    "aten.grid_sampler_3d",
)  # fmt: skip
def spatial(call: Call) -> Dims | list[Dims]:
    """Pooling and resampling: batch and channels pass, positions keep their number, but where they are taken singly."""
    x = call.args[0]
    labels = call.labels(x)
    name = call.func._opname
    positions = int(next(c for c in name if c.isdigit()))
    dims = {}
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
    if name.startswith("max_unpool"):  # each entry goes where its index says, channel by channel
        dims = {dim: call.ledger.tie([found, call.labels(call.args[1]).at(dim)], name) for dim, found in dims.items()}
    return dims if isinstance(call.out, Tensor) else [dims] * len(call.out)


def _one_by_one(call: Call, place: int) -> bool:
    """Tell whether the window holds one position alone, and misses none."""
    if not call.has("kernel_size") or not call.has("stride"):
        return False
    kernel, stride, padding = (call.argument(name) for name in ("kernel_size", "stride", "padding"))
    size, step, pad = (along[place % len(along)] for along in (kernel, stride or kernel, padding or (0,)))
    return (size, step, pad) == (1, 1, 0)
