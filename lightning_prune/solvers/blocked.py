r"""Prunes wide rows in one sweep over their columns, block by block; knows no layers.

What leaves in a column moves only the columns behind it, so all rows share one factor :math:`H^{-1} = U^T U`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.solvers.damping import cholesky

__all__ = ["factor", "sweep"]


def factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with ``inverse(H) == U.T @ U``, ``(columns, columns)``, inverting nothing whole.

    Raises:
        PruningError: If H is singular to working precision.
    """
    upper = cholesky(hessian.flip(0, 1)).flip(0, 1)  # H = V V^T with V upper triangular, so U = V^-1
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def sweep(
    weights: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor, int], Tensor],
    block: int,
) -> tuple[Tensor, Tensor]:
    """Prune block after block of columns; those behind make up for what leaves.

    Args:
        weights: Rows of weights, ``(rows, columns)``.
        factor: U of :func:`factor`, ``(columns, columns)``.
        choose: From saliencies of a block, ``(rows, width)``, and its first column to what stays of it.
        block: Columns per block.

    Returns:
        The new weights and what stayed, both ``(rows, columns)``.

    References:
        Frantar and Alistarh, SparseGPT, ICML 2023, alg. 1 (arXiv:2301.00774).
    """
    weights, keep = weights.clone(), torch.ones_like(weights, dtype=torch.bool)
    for start in range(0, weights.shape[1], block):
        columns = slice(start, min(start + block, weights.shape[1]))
        own = factor[columns, columns]
        keep[:, columns] = choose(0.5 * (weights[:, columns] / own.diagonal()).square(), start)
        errors = _within(weights[:, columns], own, keep[:, columns])
        weights[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return weights * keep, keep


def _within(weights: Tensor, factor: Tensor, keep: Tensor) -> Tensor:
    """Sweep over the columns of one block, in place, and return what each removal leaves to be made up for."""
    errors = torch.zeros_like(weights)
    for j in range(weights.shape[1]):
        errors[:, j] = weights[:, j] * ~keep[:, j] / factor[j, j]
        weights[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
    return errors
