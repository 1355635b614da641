r"""Exact greedy pruning of rows of weights with a quadratic error, one weight at a time (OBS, OBC).

The error of a row is :math:`\frac{1}{2}(w - w_0) H (w - w_0)^T`. Removing the weights one by one, the cheapest first,
while the others compensate, is a Cholesky factorisation of :math:`H^{-1}` with pivots chosen on the way: after k
removals the inverse on the remaining columns is :math:`H^{-1} - U^T U`, U the k scaled columns so far. As in blocked
factorisations, the inverse is updated only once in ``_PANEL`` removals, in one product, and loses the removed columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.patterns import Pattern

__all__ = ["Paths", "greedy_paths", "keep_along", "rises_along"]

_MEMORY = 128 * 2**20  # bytes of inverses worked on at a time
_PANEL = 64  # removals between two updates of the inverses


@dataclass(frozen=True, eq=False)
class Paths:
    """The order in which the weights of every row are removed, and what each removal adds to the row's error.

    Attributes:
        order: Columns in the order of removal, ``(rows, steps)`` int64.
        rises: What each removal adds to the error once all others compensate, ``(rows, steps)``.
        columns: Number of weights in a row.
    """

    order: Tensor
    rises: Tensor
    columns: int


def greedy_paths(weights: Tensor, inverse: Tensor, steps: int | None = None, pattern: Pattern | None = None) -> Paths:
    r"""Remove from every row, one by one, the weight with the least :math:`\frac{1}{2} w_q^2 / [H^{-1}]_{qq}`.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        inverse: The inverse Hessian that the rows of each group share, ``(groups, columns, columns)``.
        steps: Weights to remove from every row; all by default.
        pattern: Pattern that each row must follow.

    Returns:
        The paths of all rows, group by group, ``(groups * rows, steps)``.

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992, eq. 5; Frantar and Alistarh, Optimal
        Brain Compression, NeurIPS 2022, alg. 1 (arXiv:2208.11580).
    """
    groups, rows, columns = weights.shape
    most = columns if pattern is None else columns // pattern.of * (pattern.of - pattern.stay)
    steps = most if steps is None else min(steps, most)
    flat = weights.reshape(groups * rows, columns)
    group = torch.arange(groups, device=weights.device).repeat_interleave(rows)
    size = max(1, _MEMORY // (columns * columns * weights.element_size()))
    orders, rises = [], []
    for first in range(0, len(flat), size):
        part = slice(first, first + size)
        order, rise = _paths(flat[part], inverse, group[part], steps, pattern)
        orders.append(order)
        rises.append(rise)
    return Paths(torch.cat(orders), torch.cat(rises), columns)


def keep_along(paths: Paths, count: int) -> Tensor:
    """Remove ``count`` weights in all, each time the cheapest next one of any row.

    Returns:
        True for each weight that is kept, ``(rows, columns)`` bool.
    """
    rows = len(paths.order)
    leaving = _cheapest_next(paths)[:count]
    keep = torch.ones(rows, paths.columns, dtype=torch.bool, device=paths.order.device)
    row, step = leaving % rows, leaving // rows
    keep[row, paths.order[row, step]] = False
    return keep


def rises_along(paths: Paths, counts: Sequence[int]) -> list[float]:
    """Return the error of all rows together for each number of weights that :func:`keep_along` removes."""
    sums = paths.rises.T.reshape(-1)[_cheapest_next(paths)].cumsum(dim=0)
    return [float(sums[count - 1]) if count else 0.0 for count in counts]


def _cheapest_next(paths: Paths) -> Tensor:
    """Return the steps of all rows, numbered as in ``(steps, rows)``, in the order in which they are taken."""
    # A weight is reached only after those before it in its row, so the highest rise so far decides.
    reached = paths.rises.cummax(dim=1).values.T.reshape(-1)
    return torch.argsort(reached, stable=True)


def _paths(
    weights: Tensor, inverse: Tensor, group: Tensor, steps: int, pattern: Pattern | None
) -> tuple[Tensor, Tensor]:
    rows, columns = weights.shape
    weights = weights.clone()
    own = inverse[group]  # a copy, (rows, columns, columns)
    left = torch.arange(columns, device=weights.device).expand(rows, columns)
    room = _Room(pattern, rows, columns, weights.device)
    order, rises = [], []
    for done in range(0, steps, _PANEL):
        scaled, free, found, rose = _panel(weights, own, left, min(_PANEL, steps - done), room)
        order += found
        rises += rose
        stays = free.nonzero()[:, 1].view(rows, -1)  # every row has lost equally many, so this is a matrix
        left = left.gather(1, stays)
        weights = weights.gather(1, stays)
        scaled = _take(scaled, stays)
        own = _take(_take(own, stays).transpose(1, 2), stays)  # symmetric, so its transpose may be taken
        own.baddbmm_(scaled.transpose(1, 2), scaled, alpha=-1)
    return torch.stack(order, dim=1), torch.stack(rises, dim=1)


def _panel(
    weights: Tensor, inverse: Tensor, left: Tensor, steps: int, room: _Room
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Remove a few weights of each row; updates ``weights`` in place, but not ``inverse``, which lacks ``- U.T @ U``.

    Returns:
        U, ``(rows, steps, columns)``; the columns not removed, ``(rows, columns)``; columns and rises of each removal.
    """
    at = torch.arange(len(weights), device=weights.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    free = torch.ones_like(weights, dtype=torch.bool)
    scaled = weights.new_zeros(len(weights), steps, weights.shape[1])
    order, rises = [], []
    for k in range(steps):
        allowed = room.allowed(free, left)
        saliency = torch.where(allowed, weights.square() / diagonal, torch.inf)
        q = saliency.argmin(dim=1)
        # Column q of the inverse as it is now: the old one, minus the removals of this panel.
        column = torch.baddbmm(inverse[at, q][:, None], scaled[at, :k, q][:, None], scaled[:, :k], alpha=-1)[:, 0]
        pivot, weight = column[at, q], weights[at, q]
        weights -= (weight / pivot)[:, None] * column
        scaled[:, k] = column * pivot.rsqrt()[:, None]
        diagonal -= scaled[:, k].square()
        free[at, q] = False
        order.append(left[at, q])
        rises.append(0.5 * weight.square() / pivot)
        room.take(order[-1])
    return scaled, free, order, rises


def _take(matrices: Tensor, columns: Tensor) -> Tensor:
    """Return each matrix ``(n, columns)`` with its own choice of columns."""
    return matrices.gather(2, columns[:, None].expand(-1, matrices.shape[1], -1))


class _Room:
    """How many weights may still be removed from each block of a pattern."""

    def __init__(self, pattern: Pattern | None, rows: int, columns: int, device: torch.device) -> None:
        self.pattern = pattern
        if pattern is not None:
            self.left = torch.full((rows, columns // pattern.of), pattern.of - pattern.stay, device=device)

    def allowed(self, free: Tensor, columns: Tensor) -> Tensor:
        """Return which of the free columns may be removed."""
        if self.pattern is None:
            return free
        return free & (self.left.gather(1, self.pattern.block_of(columns)) > 0)

    def take(self, columns: Tensor) -> None:
        """Record the removal of one column of each row."""
        if self.pattern is not None:
            rows = torch.arange(len(columns), device=columns.device)
            self.left[rows, self.pattern.block_of(columns)] -= 1
