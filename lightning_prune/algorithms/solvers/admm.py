r"""ADMM: prunes all rows of a layer together by alternating directions, with matrix products alone.

Dense weights, which minimise the error, and sparse weights are drawn together by a growing penalty :math:`\rho`: at
first the support may change freely, in the end it is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import mean_diagonal

# Found by trying, on layers of several kinds: slower growth finds a little better.
_FIRST = 0.01  # rho, in mean diagonal entries of H
_RESTLESS, _SETTLED = 0.12, 0.002  # shares of weights that are exchanged in three rounds
_WIDE = 512  # columns above which rho grows faster
_NARROW_GROWTH = (1.03, 1.03, 1.3)  # of rho: above the one share, between both, below the other
_WIDE_GROWTH = (1.2, 1.1, 1.5)
_AT_ONCE, _ROWS = 2**16, 256  # weights of which dense ones are computed together, or rows if these are more


def alternate(
    weights: Tensor, hessian: Tensor, choose: Callable[[Tensor, bool], Tensor], rounds: int = 600
) -> tuple[Tensor, Tensor]:
    r"""Choose which weights to keep so that :math:`\frac{1}{2}\operatorname{tr}((W - W_0) H (W - W_0)^T)` is small.

    Works in single precision, which suffices to choose.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``, in any precision.
        hessian: Positive definite, ``(groups, columns, columns)``.
        choose: From weights to the mask of those that are kept, and from whether a mask of about that size will do.
        rounds: Iterations at most, a multiple of three; it stops when the choice is the same as three rounds before.

    Returns:
        True for each weight that is kept, ``(groups, rows, columns)`` bool, and what ADMM makes of the weights, in
        single precision: near to the best on what is kept, which are not zero elsewhere.

    References:
        Boyd et al., Distributed Optimization via ADMM, 2011, sec. 9.1; Meng et al., ALPS, NeurIPS 2024
        (arXiv:2406.07831).
    """
    # In units of the mean diagonal entry and of the largest weight, single precision cannot overflow.
    low, high = weights.aminmax()
    size = torch.maximum(-low, high).to(hessian).clamp_min(torch.finfo(hessian.dtype).tiny)
    scaled = _divided(hessian, mean_diagonal(hessian)[:, None, None])
    solve = _Solver(scaled, weights.shape[1])
    aim = _divided(weights, size)
    pull = aim @ scaled
    del scaled
    restless, slow, settled = _NARROW_GROWTH if aim.shape[2] <= _WIDE else _WIDE_GROWTH
    rho = before = _FIRST
    kept = keep = choose(aim, False)
    for i in range(rounds):
        if i % 3 == 0:
            solve.factor(rho)
        # Dense weights solve W (H + rho I) = W0 H + rho (sparse - u), u the scaled dual. After a round, what ADMM aims
        # at is sparse where it is chosen, and u elsewhere. When rho grows from before, u shrinks by before / rho.
        for part in _parts(aim):
            own = aim[part]
            dual = own.masked_fill(keep[part], 0)
            wanted = torch.add(pull[part], own, alpha=rho).sub_(dual, alpha=rho + before)
            torch.add(solve(part[0], wanted), dual, alpha=before / rho, out=own)
        before = rho
        rough = i % 3 < 2
        keep = choose(aim, rough)
        if rough:  # the penalty grows every third round
            continue
        changed = int((keep != kept).count_nonzero()) / (2 * keep.numel())
        if not changed:
            break
        kept = keep
        if changed > _RESTLESS:
            rho *= restless
        else:
            rho *= slow if changed > _SETTLED else settled
    return keep, aim.mul_(size)


def _divided(values: Tensor, unit: Tensor) -> Tensor:
    """Return ``values / unit`` in single precision, divided in the unit's, a part at a time."""
    found = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    rows = max(_ROWS, _AT_ONCE // values.shape[2])
    for first in range(0, values.shape[1], rows):
        part = slice(first, first + rows)
        found[:, part] = values[:, part].to(unit.dtype) / unit
    return found


class _Solver:
    """Solves ``X (H + rho I) = Y`` for one rho after another."""

    def __init__(self, hessian: Tensor, rows: int) -> None:
        self.values, self.vectors = torch.linalg.eigh(hessian)  # one factorisation serves every rho
        self.rho = 0.0
        # With an inverse, a round takes one product instead of two. It serves three rounds.
        self.inverts = hessian.shape[-1] < 3 * rows
        self.inverse = torch.empty_like(hessian) if self.inverts else None

    def factor(self, rho: float) -> None:
        self.rho = rho
        if self.inverse is not None:
            columns = self.inverse.shape[1]
            rows = max(_ROWS, _AT_ONCE // columns)
            for first in range(0, columns, rows):
                part = slice(first, first + rows)
                scaled = self.vectors[:, part] / (self.values + rho)[:, None]
                self.inverse[:, part] = scaled @ self.vectors.transpose(1, 2)

    def __call__(self, group: int, wanted: Tensor) -> Tensor:
        """Return X for some rows of a group, ``(rows, columns)``."""
        if self.inverse is not None:
            return wanted @ self.inverse[group]
        vectors = self.vectors[group]
        return (wanted @ vectors).div_(self.values[group] + self.rho) @ vectors.T


def _parts(weights: Tensor) -> list[tuple[int, slice]]:
    """Part the rows of all groups into a few at a time."""
    rows = max(_ROWS, _AT_ONCE // weights.shape[2])
    return [
        (group, slice(first, first + rows))
        for group in range(weights.shape[0])
        for first in range(0, weights.shape[1], rows)
    ]
