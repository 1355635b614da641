"""Compares outputs of operators by random projections, so that none need be kept; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["agree", "fingerprint", "kept_dim"]

_WIDEST = 4096  # a dimension that is not projected on one number
_HUGE = 1e20  # a mask of attention, beside which nothing else would show
_TABLE = 1 << 16
_APART = 4099  # between the numbers that two dimensions of a tensor are projected on, so that swapped ones differ


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = 0.5 + torch.rand(_TABLE, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (_TABLE,), generator=generator) * 2 - 1
    return (size * sign).to(device=device, dtype=dtype)


def directions(size: int, dim: int, like: Tensor) -> Tensor:
    """Return what a dimension of this size is projected on, ``(size,)``: random signs times 0.5 to 1.5."""
    table = _table(like.dtype, like.device)
    if size + dim * _APART > _TABLE:
        table = table.repeat(1 + (size + dim * _APART) // _TABLE)
    return table[dim * _APART : dim * _APART + size]


def kept_dim(shape: Sequence[int], first: Sequence[int]) -> int | None:
    """Return the dimension that is not projected: the first named one, else the largest of reasonable size."""
    named = [dim for dim in first if shape[dim] <= _WIDEST]
    if named:
        return named[0]
    sizes = [(size, -dim) for dim, size in enumerate(shape) if size <= _WIDEST]
    return -max(sizes)[1] if sizes else None


def fingerprint(out: Tensor, keep: int | None, along: Sequence[Tensor | None]) -> Tensor:
    """Project a tensor, entry by entry of one dimension.

    Entries that are not finite, or huge, count as small fixed numbers, so that others beside them show.

    Args:
        out: Floating point or complex, any shape.
        keep: The dimension that is not projected, if any.
        along: For each dimension what it is projected on, ``(size,)``; None for random directions.

    Returns:
        Projections, ``(size of keep,)`` or ``(1,)``, in float32 or better.
    """
    if out.is_complex():
        out = torch.view_as_real(out)
        along = [*along, None]
    if out.dtype not in (torch.float32, torch.float64):
        out = out.float()
    found = _projected(out, keep, along)
    if not bool((found.abs() < _HUGE).all()):
        out = torch.where(out.abs() < _HUGE, out, 1.0)
        out = torch.where(out.isnan(), 0.5, out)
        found = _projected(out, keep, along)
    return found


def _projected(out: Tensor, keep: int | None, along: Sequence[Tensor | None]) -> Tensor:
    def direction(dim: int) -> Tensor:
        given = along[dim]
        return directions(out.shape[dim], dim, out) if given is None else given.to(out)

    first = -1 if keep is None else keep
    found = out
    for dim in range(out.dim() - 1, first, -1):
        found = found @ direction(dim)
    for dim in range(first - 1, -1, -1):
        found = torch.matmul(direction(dim), found)
    return found.reshape(-1)


def agree(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Return whether two fingerprints are equal to rounding, relative to the largest entry."""
    if one.shape != other.shape:
        return False
    scale = max(float(one.abs().max()), float(other.abs().max())) if one.numel() else 0.0
    return scale == 0.0 or float((one - other).abs().max()) <= tolerance * scale
