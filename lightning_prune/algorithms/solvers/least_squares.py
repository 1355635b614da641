r"""Least squares with some weights fixed at zero, in closed form or by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import cholesky, damped

__all__ = ["best_on_columns", "best_on_support", "nearer_on_support", "refit", "rise"]

_MEMORY = 4 * 2**20  # bytes of Hessians held at a time
_AT_ONCE, _ROWS = 2**16, 128  # weights fitted together by conjugate gradients, and rows at least


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


def _nearer(weights: Tensor, hessian: Tensor, keep: Tensor, start: Tensor, steps: int, tolerance: float) -> Tensor:
    """Fit a few rows of one group, ``(rows, columns)``."""
    scale = hessian.diagonal()  # Jacobi preconditioner
    pull = (weights @ hessian) * keep
    found = start * keep
    residual = pull - (found @ hessian) * keep
    enough = tolerance**2 * (pull.square() / scale).sum(dim=1, keepdim=True)
    del pull
    direction = residual / scale
    length = (residual * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(length.dtype).tiny  # rows that have converged divide zero by this
    for _ in range(steps):
        if (length <= enough).all():
            break
        product = (direction @ hessian).mul_(keep)
        step = length / (direction * product).sum(dim=1, keepdim=True).clamp_min(tiny)
        found += step * direction
        residual -= step * product
        ahead = residual / scale
        before, length = length, (residual * ahead).sum(dim=1, keepdim=True)
        direction = ahead.add_(length / before.clamp_min(tiny) * direction)
    return found


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
    rows = max(_ROWS, _AT_ONCE // change.shape[2])
    for part in change.split(rows, dim=1):  # products of all rows at once would weigh twice as much as they do
        total += ((part @ hessian) * part).sum(dim=(1, 2))
    return 0.5 * total


def _solve(hessian: Tensor, pull: Tensor, keep: Tensor) -> Tensor:
    """Solve each row's own system, with ones on the diagonal of removed columns."""
    both = keep[:, :, None] & keep[:, None, :]
    own = torch.where(both, hessian, torch.diag_embed((~keep).to(hessian)))
    return torch.cholesky_solve((pull * keep)[..., None], cholesky(own))[..., 0] * keep
