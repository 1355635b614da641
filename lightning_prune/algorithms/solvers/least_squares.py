r"""Least squares with some weights fixed at zero, in closed form or by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import cholesky, damped

__all__ = ["best_on_columns", "best_on_support", "fit_by_blocks", "nearer_on_support", "refit", "rise", "share_lost"]

_MEMORY = 4 * 2**20  # bytes of Hessians held at a time
_AT_ONCE, _ROWS = 2**16, 128  # weights fitted together by conjugate gradients, and rows at least
_WIDTH = 128  # columns of a block
_TOGETHER = 512  # rows of a block that fit into a processor's cache


def best_on_support(weights: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    r"""Return the rows nearest to ``weights``, measured by H, with zeros where ``keep`` is False.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        hessian: Positive definite, shared by the rows of each group, ``(groups, columns, columns)``.
        keep: True for each weight that is kept, ``(groups, rows, columns)`` bool.

    Returns:
        The minimisers of :math:`(w - w_0) H (w - w_0)^T`, ``(groups, rows, columns)``.

    Raises:
        PruningError: If H is singular on what a row keeps.

    Examples:
        >>> H = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> best_on_support(torch.tensor([[[1.0, 1.0]]]), H, torch.tensor([[[True, False]]]))
        tensor([[[1.5000, 0.0000]]])
    """
    groups, rows, columns = weights.shape
    pull = (weights @ hessian).reshape(-1, columns)  # right-hand side of the normal equations
    flat = keep.reshape(-1, columns)
    group = torch.arange(groups, device=weights.device).repeat_interleave(rows)
    size = max(1, _MEMORY // (columns * columns * weights.element_size()))
    found = []
    for first in range(0, len(flat), size):
        part = slice(first, first + size)
        found.append(_solve(hessian[group[part]], pull[part], flat[part]))
    return torch.cat(found).reshape(weights.shape)


def nearer_on_support(
    weights: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, steps: int = 100, tolerance: float = 1e-6
) -> Tensor:
    """Approximate :func:`best_on_support` by conjugate gradients, with matrix products only: for wide rows.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``, in any precision.
        hessian: Positive definite, ``(groups, columns, columns)``.
        keep: True for each weight that is kept, ``(groups, rows, columns)`` bool.
        start: Initial weights, ``(groups, rows, columns)``; removed ones count as zero.
        steps: Iterations at most.
        tolerance: Stop once the preconditioned residual is this small, relative to that of all zeros.

    Returns:
        Rows with zeros where ``keep`` is False, no farther from ``weights``, measured by H, than ``start``; in the
        Hessian's precision.
    """
    found = torch.empty(weights.shape, dtype=hessian.dtype, device=weights.device)
    rows = max(_ROWS, _AT_ONCE // weights.shape[2])
    for group, own in enumerate(hessian):
        for first in range(0, weights.shape[1], rows):
            part = group, slice(first, first + rows)
            found[part] = _nearer(weights[part].to(own), own, keep[part], start[part].to(own), steps, tolerance)
    return found


def fit_by_blocks(
    weights: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, passes: int = 3, steps: int = 3, width: int = _WIDTH
) -> Tensor:
    """Approximate :func:`best_on_support` block by block of columns, from the last to the first.

    Each block is fitted by a few steps of conjugate gradients while all others are held. One pass takes little more
    than one product of weights and Hessian, and brings nearer than two steps of :func:`nearer_on_support`.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        hessian: Positive definite, ``(groups, columns, columns)``.
        keep: True for each weight that is kept, ``(groups, rows, columns)`` bool.
        start: Initial weights, ``(groups, rows, columns)``, zero where ``keep`` is False.
        passes: Times that every block is fitted.
        steps: Iterations in a block.
        width: Columns of a block.

    Returns:
        Rows with zeros where ``keep`` is False, no farther from ``weights``, measured by H, than ``start``.
    """
    found = start.clone()
    firsts = list(reversed(range(0, weights.shape[2], width)))
    if len(firsts) == 1:
        passes, steps = 1, passes * (steps + 1)  # a block alone need not begin anew, which takes a product, too
    for first in range(0, weights.shape[1], _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        own, change = found[:, rows], weights[:, rows] - start[:, rows]
        kept = keep[:, rows].to(change)  # products with masks of bool take several times as long
        for column in passes * firsts:
            block = slice(column, column + width)
            residual = (change @ hessian[:, :, block]).mul_(kept[..., block])
            step = _descent(hessian[:, block, block], residual, kept[..., block], steps)
            own[..., block] += step
            change[..., block] -= step
    return found


def _nearer(weights: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Fit a few rows of one group, ``(rows, columns)``."""
    pull = (weights @ hessian) * keep
    found = start * keep
    residual = pull - (found @ hessian) * keep
    enough = tolerance**2 * (pull.square() / hessian.diagonal()).sum(dim=1, keepdim=True)
    del pull
    return found.add_(_descent(hessian, residual, keep.to(residual), steps, enough))


def _descent(hessian: Tensor, residual: Tensor, keep: Tensor, steps: int, enough: Tensor | float = 0.0) -> Tensor:
    """Return the steps that conjugate gradients take on the kept weights, ``(..., rows, columns)``.

    Args:
        hessian: ``(..., columns, columns)``.
        residual: Negative gradient of the error, zero where ``keep`` is False; changed in place.
        keep: 1 for each weight that is kept, else 0, in the dtype of the rest.
        steps: Iterations at most.
        enough: Squared length of the preconditioned residual at which a row has converged.
    """
    # In units of the root of H's diagonal, conjugate gradients are preconditioned by it (Jacobi).
    unit = hessian.diagonal(dim1=-2, dim2=-1).rsqrt()[..., None, :]
    kept = keep * unit
    residual *= unit
    found = torch.zeros_like(residual)
    direction = residual.clone()
    length = residual.square().sum(dim=-1, keepdim=True)
    for _ in range(steps):
        if (length <= enough).all():
            break
        product = ((direction * unit) @ hessian).mul_(kept)
        curvature = (direction * product).sum(dim=-1, keepdim=True)
        # Rows that have converged move no further; nor do those whose curvature is lost in rounding.
        step = torch.where(curvature > 0, length / curvature, 0)
        found.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        before, length = length, residual.square().sum(dim=-1, keepdim=True)
        torch.addcmul(residual, torch.where(before > 0, length / before, 0), direction, out=direction)
    return found.mul_(unit)


def best_on_columns(weights: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """Return the best rows on fewer columns, the same in all rows: kept columns compensate for removed ones.

    Args:
        weights: Rows of weights, ``(rows, columns)``.
        hessian: Positive definite on the kept columns, ``(columns, columns)``.
        keep: True for each column that is kept, ``(columns,)`` bool.

    Returns:
        The kept columns' new weights, ``(rows, kept)``.

    Raises:
        PruningError: If H is singular on the kept columns.
    """
    pull = (weights @ hessian)[:, keep]
    factor = cholesky(hessian[keep][:, keep])
    return torch.cholesky_solve(pull.T, factor).T


def refit(
    weights: Tensor,
    start: Tensor,
    cross: Tensor,
    after: Tensor,
    mean_before: Tensor,
    mean_after: Tensor,
    damping: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Fit rows to new inputs y so that their outputs match the old ones on x: :math:`W x \approx \hat W y + s`.

    Args:
        weights: W, ``(groups, rows, columns)``.
        start: The rows that the damping pulls :math:`\hat W` to, ``(groups, rows, new columns)``.
        cross: Mean of :math:`x y^T`, ``(groups, columns, new columns)``.
        after: Mean of :math:`y y^T`, ``(groups, new columns, new columns)``.
        mean_before: Mean of x, ``(groups, columns)``; zeros if no shift can be applied.
        mean_after: Mean of y, ``(groups, new columns)``; likewise.
        damping: Fraction of the mean variance of y.
        keep: False where :math:`\hat W` is held at zero, ``(groups, rows, new columns)`` bool; by default nowhere.

    Returns:
        :math:`\hat W`, and the shift s, ``(groups, rows)``.

    Raises:
        PruningError: If the inputs are linearly dependent and not damped.
    """
    # Covariances: the shift takes care of the means.
    covariance = after - mean_after[:, :, None] * mean_after[:, None]
    cross_covariance = cross - mean_before[:, :, None] * mean_after[:, None]
    regular = damped(covariance, damping, after)
    pull = weights @ cross_covariance + start @ (regular - covariance)
    new = torch.cholesky_solve(pull.transpose(1, 2), cholesky(regular)).transpose(1, 2)
    if keep is not None:
        new = nearer_on_support(new, regular, keep, start)
    shift = weights @ mean_before[..., None] - new @ mean_after[..., None]
    return new, shift[..., 0]


def rise(change: Tensor, hessian: Tensor) -> Tensor:
    r"""Return :math:`\frac{1}{2}\operatorname{tr}(\Delta H \Delta^T)` of each group.

    Args:
        change: Change of the weights, ``(groups, rows, columns)``.
        hessian: ``(groups, columns, columns)``.

    Returns:
        ``(groups,)``.
    """
    total = hessian.new_zeros(len(hessian))
    for first in range(0, change.shape[2], _WIDTH):
        block = slice(first, first + _WIDTH)
        own = change[..., block]
        # H is symmetric: what lies behind its diagonal blocks equals what lies before them.
        pull = 0.5 * (own @ hessian[:, block, block]) + change[..., :first] @ hessian[:, :first, block]
        total += (pull * own).sum(dim=(1, 2))
    return total


def share_lost(new: Tensor, weights: Tensor, hessian: Tensor, added: Tensor) -> float:
    """Return the energy of the change relative to that of the weights, both measured by H; of nothing, 0.

    Works in single precision.

    Args:
        new: The new weights, ``(groups, rows, columns)``.
        weights: The old ones, in the same shape.
        hessian: ``(groups, columns, columns)``, damped.
        added: What damping added to its diagonals, ``(groups,)``, which is not counted.
    """
    # In these units, single precision cannot overflow.
    low, high = weights.aminmax()
    size = torch.maximum(-low, high).to(hessian).clamp_min(torch.finfo(hessian.dtype).tiny)
    scale = hessian.diagonal(dim1=1, dim2=2).amax().clamp_min(torch.finfo(hessian.dtype).tiny)
    single, less = torch.empty_like(hessian, dtype=torch.float32), (added / scale).float()
    for first in range(0, hessian.shape[1], _ROWS):
        single[:, first : first + _ROWS] = hessian[:, first : first + _ROWS] / scale
    lost = whole = 0.0
    at_once = max(_ROWS, _AT_ONCE // weights.shape[2])
    for first in range(0, weights.shape[1], at_once):
        rows = slice(first, first + at_once)
        before = weights[:, rows].to(hessian) / size
        change = (new[:, rows] / size - before).float()
        lost += _energy(change, single, less)
        whole += _energy(before.float(), single, less)
    return lost / whole if whole > 0 else 0.0


def _energy(rows: Tensor, hessian: Tensor, added: Tensor) -> float:
    of_damping = 0.5 * added * rows.square().sum(dim=(1, 2))
    return float((rise(rows, hessian) - of_damping).clamp_min(0).sum())


def _solve(hessian: Tensor, pull: Tensor, keep: Tensor) -> Tensor:
    """Solve each row's own system, with ones on the diagonal of removed columns."""
    both = keep[:, :, None] & keep[:, None, :]
    own = torch.where(both, hessian, torch.diag_embed((~keep).to(hessian)))
    return torch.cholesky_solve((pull * keep)[..., None], cholesky(own))[..., 0] * keep
