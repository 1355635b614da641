r"""Trades weights of a row that stay for others that do not, as long as its error falls; knows no layers.

Of a row, with S what stays: removing i costs :math:`\frac{1}{2} w_i^2 / [(H_{SS})^{-1}]_{ii}`, and adding j gains
:math:`\frac{1}{2} g_j^2 / s_j`, g the pull on what does not stay and :math:`s_j` what S leaves of :math:`H_{jj}`. Each
trade changes the inverse, g and s by rank-one updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import inverse
from lightning_prune.algorithms.solvers.patterns import Pattern

__all__ = ["exchange"]

_MEMORY = 128 * 2**20  # bytes of inverses worked on at a time
_ROUNDS = 100  # trades of a row; a third of that has been enough


def exchange(weights: Tensor, hessian: Tensor, keep: Tensor, pattern: Pattern | None = None) -> Tensor:
    r"""Trade the cheapest weight of a row for the one that then gains most, until that is the same one.

    Every row keeps as many weights as it had. Holds an inverse for each row, so it is for rows hundreds wide.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        hessian: Positive definite, shared by the rows of each group, ``(groups, columns, columns)``.
        keep: True for each weight that stays, ``(groups, rows, columns)`` bool.
        pattern: What each row follows, and goes on to.

    Returns:
        True for each weight that stays now, in the shape of ``keep``; the best weights on it are no farther from
        ``weights``, measured by H, than the best on ``keep``.

    Raises:
        PruningError: If H is singular on what a row keeps.
    """
    groups, rows, columns = weights.shape
    flat, kept = weights.reshape(-1, columns), keep.reshape(-1, columns).clone()
    group = torch.arange(groups, device=weights.device).repeat_interleave(rows)
    size = max(1, _MEMORY // (columns * columns * weights.element_size()))
    for part in (kept.any(dim=1) & ~kept.all(dim=1)).nonzero()[:, 0].split(size):
        kept[part] = _traded(flat[part], hessian[group[part]], kept[part], pattern)
    return kept.view_as(keep)


def _traded(weights: Tensor, hessian: Tensor, keep: Tensor, pattern: Pattern | None) -> Tensor:
    fit = _Fit(weights, hessian, keep)
    found, trading = keep.clone(), torch.arange(len(keep), device=keep.device)
    block = torch.arange(keep.shape[1], device=keep.device)
    block = block if pattern is None else pattern.block_of(block)
    for _ in range(_ROUNDS):
        out = fit.costs().argmin(dim=1)
        fit.remove_(out)
        gains = fit.gains() if pattern is None else fit.gains().where(block == block[out][:, None], -torch.inf)
        back = gains.argmax(dim=1)
        if not (going := back != out).any():
            break
        fit.add_(back)
        fit, trading = fit.rows(going), trading[going]
        found[trading] = fit.keep
    return found


class _Fit:
    """The best weights on what stays, and what tells how a change of it would change the error.

    Attributes:
        keep: True for what stays, ``(rows, columns)``, as all below unless told otherwise.
        weights: The best on it.
        pull: What each of the others would still pull by; zero for those that stay.
        stiffness: What those that stay leave of each diagonal entry of H.
        inverse: Of H on what stays, zero elsewhere, ``(rows, columns, columns)``.
    """

    def __init__(self, weights: Tensor, hessian: Tensor, keep: Tensor) -> None:
        both = keep[:, :, None] & keep[:, None, :]
        self.hessian, self.keep = hessian, keep.clone()
        self.inverse = inverse(torch.where(both, hessian, torch.diag_embed((~keep).to(hessian)))) * both
        whole = _times(hessian, weights)
        self.weights = _times(self.inverse, whole * keep)
        self.pull = whole - _times(hessian, self.weights)
        self.stiffness = hessian.diagonal(dim1=1, dim2=2) - ((hessian @ self.inverse) * hessian).sum(dim=2)

    def costs(self) -> Tensor:
        """Return twice what the removal of each would cost; infinity for those that have left."""
        return torch.where(self.keep, self.weights.square() / self.inverse.diagonal(dim1=1, dim2=2), torch.inf)

    def gains(self) -> Tensor:
        """Return twice what the addition of each would gain; minus infinity for those that stay."""
        return torch.where(self.keep, -torch.inf, self.pull.square() / self.stiffness)

    def remove_(self, column: Tensor) -> None:
        """Remove one of each row, ``(rows,)``."""
        at = self._rows
        direction = self.inverse[at, column].clone()
        size = direction[at, column]
        self._move_(direction, size, -1, self.weights[at, column] / size)
        self.keep[at, column] = False
        self.weights[at, column] = 0
        self.inverse[at, column] = 0
        self.inverse[at, :, column] = 0

    def add_(self, column: Tensor) -> None:
        """Add one to each row, ``(rows,)``."""
        at = self._rows
        direction = _times(self.inverse, self.hessian[at, column])
        direction[at, column] = -1
        size = self.stiffness[at, column]
        self._move_(direction, size, 1, self.pull[at, column] / size)
        self.keep[at, column] = True

    def rows(self, which: Tensor) -> _Fit:
        """Return some of the rows, ``which`` bool; these themselves where it is all."""
        if not which.all():
            for name, value in vars(self).items():
                setattr(self, name, value[which])
        return self

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.keep), device=self.keep.device)

    def _move_(self, direction: Tensor, size: Tensor, sign: int, step: Tensor) -> None:
        """Move the weights against ``direction`` and the inverse by its outer product, all else with them."""
        self.inverse.baddbmm_((direction * (sign / size)[:, None])[:, :, None], direction[:, None])
        seen = _times(self.hessian, direction)
        self.stiffness = self.stiffness - sign * seen.square() / size[:, None]
        self.weights = self.weights - step[:, None] * direction
        self.pull = self.pull + step[:, None] * seen


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]
