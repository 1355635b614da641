r"""Prunes rows of weights that share a quadratic error, one weight at a time, exactly; knows no layers.

The error of a row is :math:`\frac{1}{2}(w - w_0) H (w - w_0)^T`. Removing the weights one by one, the cheapest first,
and moving the others along, is a Cholesky factorisation of :math:`H^{-1}` whose pivots are chosen on the way: after k
removals the inverse of what is left is :math:`H^{-1} - U^T U`, U the k scaled columns so far. As in a blocked
factorisation, the inverse follows only after every so many removals, in one product, and without what has left.
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
    """In which order the weights of every row leave, and what each adds to the row's error.

    Attributes:
        order: Columns in the order they leave, ``(rows, steps)`` int64.
        rises: What each adds to the error, all others moving to make up for it, ``(rows, steps)``.
        columns: How many weights a row has.
    """

    order: Tensor
    rises: Tensor
    columns: int


def greedy_paths(weights: Tensor, inverse: Tensor, steps: int | None = None, pattern: Pattern | None = None) -> Paths:
    r"""Remove from every row, one by one, the weight with the least :math:`\frac{1}{2} w_q^2 / [H^{-1}]_{qq}`.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        inverse: The inverse Hessian that the rows of each group share, ``(groups, columns, columns)``.
        steps: How many weights leave every row; all unless told otherwise.
        pattern: What each row must follow.

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
    found = [_paths(w, inverse, g, steps, pattern) for w, g in zip(flat.split(size), group.split(size), strict=True)]
    return Paths(torch.cat([order for order, _ in found]), torch.cat([rises for _, rises in found]), columns)


def keep_along(paths: Paths, count: int) -> Tensor:
    """Choose which ``count`` weights leave, the cheapest next ones of all rows first.

    Returns:
        True for each weight that stays, ``(rows, columns)`` bool.
    """
    rows = len(paths.order)
    leaving = _cheapest_next(paths)[:count]
    keep = torch.ones(rows, paths.columns, dtype=torch.bool, device=paths.order.device)
    row, step = leaving % rows, leaving // rows
    keep[row, paths.order[row, step]] = False
    return keep


def rises_along(paths: Paths, counts: Sequence[int]) -> list[float]:
    """Return the error of all rows together once so many weights have left as :func:`keep_along` chooses them."""
    sums = paths.rises.T.reshape(-1)[_cheapest_next(paths)].cumsum(dim=0)
    return [float(sums[count - 1]) if count else 0.0 for count in counts]


def _cheapest_next(paths: Paths) -> Tensor:
    """Return steps, numbered ``(steps, rows)``, in the order in which they are taken over all rows."""
    # A weight is reached only after those before it, so what counts is the highest rise so far; the earlier step first.
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
        stays = free.nonzero()[:, 1].view(rows, -1)
        left, weights, scaled = left.gather(1, stays), weights.gather(1, stays), _take(scaled, stays)
        own = _take(_take(own, stays).transpose(1, 2), stays)  # symmetric
        own.baddbmm_(scaled.transpose(1, 2), scaled, alpha=-1)
    return torch.stack(order, dim=1), torch.stack(rises, dim=1)


def _panel(
    weights: Tensor, inverse: Tensor, left: Tensor, steps: int, room: _Room
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Remove a few weights of each row; ``weights`` follow in place, ``inverse`` stays behind by ``U.T @ U``.

    Returns:
        U, ``(rows, steps, columns)``; what has not left, ``(rows, columns)``; and of each removal columns and rises.
    """
    at = torch.arange(len(weights), device=weights.device)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    free = torch.ones_like(weights, dtype=torch.bool)
    scaled = weights.new_zeros(len(weights), steps, weights.shape[1])
    order, rises = [], []
    for k in range(steps):
        allowed = room.allowed(free, left)
        q = torch.where(allowed, weights.square() / diagonal, torch.inf).argmin(dim=1)
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
    """Return, of each matrix ``(n, columns)``, its own choice of columns."""
    return matrices.gather(2, columns[:, None].expand(-1, matrices.shape[1], -1))


class _Room:
    """How many weights may still leave from each block of columns."""

    def __init__(self, pattern: Pattern | None, rows: int, columns: int, device: torch.device) -> None:
        self.pattern = pattern
        if pattern is not None:
            self.left = torch.full((rows, columns // pattern.of), pattern.of - pattern.stay, device=device)

    def allowed(self, free: Tensor, columns: Tensor) -> Tensor:
        """Tell which of the free columns lie in blocks that are not used up."""
        return free if self.pattern is None else free & (self.left.gather(1, self.pattern.block_of(columns)) > 0)

    def take(self, columns: Tensor) -> None:
        """Count one column of each row."""
        if self.pattern is not None:
            self.left[torch.arange(len(columns), device=columns.device), self.pattern.block_of(columns)] -= 1
