"""Compares outputs of operators by random projections, so that none need be kept; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Print", "agree", "difference", "directions", "fingerprint", "kept_dim"]

_WIDEST = 4096  # a dimension that is not projected on one number
_HUGE = 1e20  # a mask of attention, beside which nothing else would show
_TABLE = 1 << 16
_APART = 4099  # between the numbers that two dimensions of a tensor are projected on, so that swapped ones differ


class Print(NamedTuple):
    """Projections of a tensor, ``(size of the kept dimension,)``, and the largest of them."""

    values: Tensor
    scale: float


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = 0.5 + torch.rand(_TABLE, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (_TABLE,), generator=generator) * 2 - 1
    return (size * sign).to(device=device, dtype=dtype)


def directions(size: int, dim: int, like: Tensor) -> Tensor:
    """Return what a dimension of this size is projected on, ``(size,)``: random signs times 0.5 to 1.5."""
    return _direction(size, dim, like.dtype, like.device)


@lru_cache(4096)
def _direction(size: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    table = _table(dtype, device)
    if size + dim * _APART > _TABLE:
        table = table.repeat(1 + (size + dim * _APART) // _TABLE)
    return table[dim * _APART : dim * _APART + size]


@lru_cache(64)
def _directions_behind(sizes: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the products of the directions of neighbouring dimensions, the first of which is ``dim``, flattened."""
    behind = _direction(sizes[0], dim, dtype, device)
    for more, size in enumerate(sizes[1:], dim + 1):
        behind = (behind[:, None] * _direction(size, more, dtype, device)).reshape(-1)
    return behind


def kept_dim(shape: Sequence[int], first: Sequence[int]) -> int | None:
    """Return the dimension that is not projected: the first named one, else the largest of reasonable size."""
    named = [dim for dim in first if shape[dim] <= _WIDEST]
    if named:
        return named[0]
    sizes = [(size, -dim) for dim, size in enumerate(shape) if size <= _WIDEST]
    return -max(sizes)[1] if sizes else None


def fingerprint(out: Tensor, keep: int | None, along: Sequence[Tensor | None]) -> Print:
    """Project a tensor, entry by entry of one dimension.

    Entries that are not finite, or huge, count as small fixed numbers, so that others beside them show.

    Args:
        out: Floating point or complex, any shape.
        keep: The dimension that is not projected, if any.
        along: For each dimension what it is projected on, ``(size,)``; None for random directions.

    Returns:
        Projections in float32 or better, one where no dimension is kept.
    """
    out = out.detach()  # the model's own code may turn gradients on
    if out.is_complex():
        out = torch.view_as_real(out.resolve_conj())
        along = [*along, None]
    if out.dtype not in (torch.float32, torch.float64):
        out = out.float()
    found = _projected(out, keep, along)
    scale = float(found.abs().max()) if found.numel() else 0.0
    if not scale < _HUGE:  # it may be no number
        finite = torch.where(out.abs() < _HUGE, out, 1.0)
        found = _projected(torch.where(out.isnan(), 0.5, finite), keep, along)
        scale = float(found.abs().max())
    return Print(found, scale)


def _projected(out: Tensor, keep: int | None, along: Sequence[Tensor | None]) -> Tensor:
    def direction(dim: int) -> Tensor:
        given = along[dim]
        return directions(out.shape[dim], dim, out) if given is None else given

    first = -1 if keep is None else keep
    found = out
    if first + 1 < out.dim():
        # one product over all that comes behind: long rows are read much faster than short ones
        if any(given is not None for given in along[first + 1 :]):
            behind = direction(first + 1)
            for dim in range(first + 2, out.dim()):
                behind = (behind[:, None] * direction(dim)).reshape(-1)
        else:
            behind = _directions_behind(tuple(out.shape[first + 1 :]), first + 1, out.dtype, out.device)
        found = out.reshape(*out.shape[: first + 1], -1) @ behind
    for dim in range(first - 1, -1, -1):
        found = torch.matmul(direction(dim), found)
    # where nothing is projected this is the output itself, which an operator in place may still change
    return found.reshape(-1) if found is not out else out.reshape(-1).clone()


def agree(full: Print, slim: Print, tolerance: float, factors: Sequence[float] = ()) -> bool:
    """Return whether two fingerprints are equal to rounding, relative to the largest entry.

    Args:
        full: That of the full model.
        slim: That of the slim one.
        tolerance: How far apart they may be.
        factors: By what entries of the slim one may be larger, each by one of these or not at all.
    """
    return difference(full, slim, factors) <= tolerance


def difference(full: Print, slim: Print, factors: Sequence[float] = ()) -> float:
    """Return the largest difference of two fingerprints, relative to their largest entry."""
    if full.values.shape != slim.values.shape:
        return float("inf")
    scale = max(full.scale, slim.scale)
    if not scale:
        return 0.0
    apart = (full.values - slim.values).abs()
    for factor in factors:
        apart = torch.minimum(apart, (factor * full.values - slim.values).abs())
    return float(apart.max()) / scale
