r"""SparseGPT: prunes wide rows in one sweep over their columns, block by block.

A removal changes only the columns behind it, so all rows share one factor :math:`H^{-1} = U^T U`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import cholesky

__all__ = ["factor", "sweep"]


def factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with ``inverse(H) == U.T @ U``, ``(columns, columns)``, without inverting H.

    Raises:
        PruningError: If H is singular to working precision.
    """
    upper = cholesky(hessian.flip(0, 1)).flip(0, 1)  # H = V V^T with V upper triangular, so U = V^-1
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def sweep(
    weights: Tensor, factor: Tensor, choose: Callable[[Tensor, int], Tensor], blocks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Prune block after block of columns; the columns behind compensate.

    Args:
        weights: Rows of weights, ``(rows, columns)``.
        factor: U of :func:`factor`, ``(columns, columns)``.
        choose: From saliencies of a block, ``(rows, width)``, and its first column to the mask of what is kept of it.
        blocks: Columns per block, or of blocks within blocks, wide ones first; choices are made in the narrowest.

    Returns:
        The new weights and what is kept, both ``(rows, columns)``.

    References:
        Frantar and Alistarh, SparseGPT, ICML 2023, alg. 1 (arXiv:2301.00774).
    """
    weights, errors, keep = weights.clone(), torch.zeros_like(weights), torch.ones_like(weights, dtype=torch.bool)
    _sweep_(weights, errors, keep, factor, choose, blocks, 0)
    return weights * keep, keep


def _sweep_(
    weights: Tensor,
    errors: Tensor,
    keep: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor, int], Tensor],
    blocks: Sequence[int],
    first: int,
) -> None:
    """Sweep in place; ``errors`` holds the scaled error of each removal, which the columns behind compensate."""
    width, *narrower = blocks
    for start in range(0, weights.shape[1], width):
        columns = slice(start, min(start + width, weights.shape[1]))
        w, e, k, u = weights[:, columns], errors[:, columns], keep[:, columns], factor[columns, columns]
        if narrower:
            _sweep_(w, e, k, u, choose, narrower, first + start)
        else:
            saliency = 0.5 * (w / u.diagonal()).square()
            k.copy_(choose(saliency, first + start))
            for j in range(w.shape[1]):
                # w, e and k are views: this writes into the whole matrices.
                e[:, j] = w[:, j] * ~k[:, j] / u[j, j]
                w[:, j:] -= e[:, j : j + 1] * u[j, j:]
        # One product for the columns behind the block, instead of one for each removal in it.
        weights[:, columns.stop :] -= e @ factor[columns, columns.stop :]
