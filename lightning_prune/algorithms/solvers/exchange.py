r"""Exchange: swaps kept weights of a row for removed ones as long as the error of the row decreases.

Let S be the kept columns of a row. Removing i from S costs :math:`\frac{1}{2} w_i^2 / [(H_{SS})^{-1}]_{ii}`. Adding j
gains :math:`\frac{1}{2} g_j^2 / s_j`, with g the gradient at the removed weights and :math:`s_j` the Schur complement
:math:`H_{jj} - H_{jS} H_{SS}^{-1} H_{Sj}`. Each exchange changes the inverse, g and s by rank-one updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import inverse
from lightning_prune.algorithms.solvers.patterns import Pattern

_MEMORY = 2 * 2**20  # bytes of inverses worked on at a time
_ROUNDS = 100  # exchanges of a row; a third of that was enough in all experiments


def exchange(
    weights: Tensor, hessian: Tensor, keep: Tensor, pattern: Pattern | None = None, share: float = 1.0
) -> Tensor:
    r"""Replace the cheapest weight of a row by the one that then gains most, until both are the same.

    Every row keeps as many weights as it had. An inverse is held for each row: use it for rows a few hundred wide.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        hessian: Positive definite, shared by the rows of each group, ``(groups, columns, columns)``.
        keep: True for each weight that is kept, ``(groups, rows, columns)`` bool.
        pattern: Pattern that each row follows before and after.
        share: Fraction of all rows that is worked on, those from which the most was removed by magnitude first.

    Returns:
        True for each weight that is kept now, in the shape of ``keep``. The best weights on this support are no farther
        from ``weights``, measured by H, than the best on ``keep``.

    Raises:
        PruningError: If H is singular on what a row keeps.
    """
    groups, rows, columns = weights.shape
    flat, kept = weights.reshape(-1, columns), keep.reshape(-1, columns).clone()
    group = torch.arange(groups, device=weights.device).repeat_interleave(rows)
    size = max(1, _MEMORY // (columns * columns * weights.element_size()))
    partly_kept = kept.any(dim=1) & ~kept.all(dim=1)  # the other rows have nothing to exchange
    chosen = partly_kept.nonzero()[:, 0]
    if share < 1:
        removed = (flat.square() * ~kept).sum(dim=1)[chosen]
        chosen = chosen[removed.argsort(descending=True, stable=True)[: int(share * len(flat))]]
    for part in chosen.split(size):
        kept[part] = _traded(flat[part], hessian[group[part]], kept[part], pattern)
    return kept.view_as(keep)


def _traded(weights: Tensor, hessian: Tensor, keep: Tensor, pattern: Pattern | None) -> Tensor:
    fit = _Fit(weights, hessian, keep)
    found, trading = keep.clone(), torch.arange(len(keep), device=keep.device)
    columns = torch.arange(keep.shape[1], device=keep.device)
    for _ in range(_ROUNDS):
        out = fit.costs().argmin(dim=1)
        fit.remove_(out)
        gains = fit.gains()
        if pattern is not None:
            # A pattern fixes the number of each block: what comes back must lie in the block of what went out.
            block = pattern.block_of(columns)
            gains = gains.where(block == block[out][:, None], -torch.inf)
        back = gains.argmax(dim=1)
        going = back != out
        if not going.any():
            break
        fit.add_(back)
        # Rows whose best exchange is none are done; the others go on.
        fit, trading = fit.rows(going), trading[going]
        found[trading] = fit.keep
    return found


class _Fit:
    """The best weights on a support, with the terms that give the cost of a removal and the gain of an addition.

    Attributes:
        keep: True for the columns in the support, ``(rows, columns)``, like all below unless stated otherwise.
        weights: The best weights on it.
        pull: Negative gradient of the error; zero on the support.
        stiffness: Schur complements, the second derivatives once the support compensates.
        inverse: Inverse of H on the support, zero elsewhere, ``(rows, columns, columns)``.
    """

    def __init__(self, weights: Tensor, hessian: Tensor, keep: Tensor) -> None:
        both = keep[:, :, None] & keep[:, None, :]
        self.hessian, self.keep = hessian, keep.clone()
        # Ones on the diagonal stand in for removed columns, so that rows of different supports invert in one batch.
        on_support = torch.where(both, hessian, torch.diag_embed((~keep).to(hessian)))
        self.inverse = inverse(on_support) * both
        whole = _times(hessian, weights)
        self.weights = _times(self.inverse, whole * keep)
        self.pull = whole - _times(hessian, self.weights)
        self.stiffness = hessian.diagonal(dim1=1, dim2=2) - ((hessian @ self.inverse) * hessian).sum(dim=2)

    def costs(self) -> Tensor:
        """Return twice the cost of removing each column; infinity outside the support."""
        return torch.where(self.keep, self.weights.square() / self.inverse.diagonal(dim1=1, dim2=2), torch.inf)

    def gains(self) -> Tensor:
        """Return twice the gain of adding each column; minus infinity on the support."""
        return torch.where(self.keep, -torch.inf, self.pull.square() / self.stiffness)

    def remove_(self, column: Tensor) -> None:
        """Remove one column from each row's support, ``(rows,)``."""
        at = self._rows
        direction = self.inverse[at, column].clone()
        size = direction[at, column]
        self._move_(direction, size, -1, self.weights[at, column] / size)
        self.keep[at, column] = False
        self.weights[at, column] = 0
        self.inverse[at, column] = 0
        self.inverse[at, :, column] = 0

    def add_(self, column: Tensor) -> None:
        """Add one column to each row's support, ``(rows,)``."""
        at = self._rows
        direction = _times(self.inverse, self.hessian[at, column])
        direction[at, column] = -1
        size = self.stiffness[at, column]
        self._move_(direction, size, 1, self.pull[at, column] / size)
        self.keep[at, column] = True

    def rows(self, which: Tensor) -> _Fit:
        """Restrict to the rows where ``which`` is True."""
        if not which.all():
            for name, value in vars(self).items():
                setattr(self, name, value[which])
        return self

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.keep), device=self.keep.device)

    def _move_(self, direction: Tensor, size: Tensor, sign: int, step: Tensor) -> None:
        """Update weights along ``direction``, the inverse by its outer product, and pull and stiffness accordingly."""
        scaled = direction * (sign / size)[:, None]
        self.inverse.baddbmm_(scaled[:, :, None], direction[:, None])
        seen = _times(self.hessian, direction)
        self.stiffness = self.stiffness - sign * seen.square() / size[:, None]
        self.weights = self.weights - step[:, None] * direction
        self.pull = self.pull + step[:, None] * seen


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]
