r"""SparseGPT: prunes wide rows in one sweep over their columns, block by block.

A removal changes only the columns behind it, so all rows share one factor :math:`H = V V^T`, V upper triangular. What
the removals so far ask of a column is found when it is its turn, from V itself: no inverse of H is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.algorithms.solvers.damping import cholesky

__all__ = ["Choose", "factor", "sweep"]

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Chooses what is kept of the next columns of a block.

Gets the block's columns from the next one on, ``(groups, columns, rows)``; the diagonal entries of the inverse of V
there, ``(groups, columns)``, whose squares divide saliencies; and the number of the next column. Returns a mask
``(groups, next columns, rows)``.
"""


def factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular V with ``H == V @ V.T``, ``(groups, columns, columns)``.

    Raises:
        PruningError: If H is singular to working precision.
    """
    return cholesky(hessian.flip(1, 2)).flip(1, 2)


def sweep(weights: Tensor, factor: Tensor, choose: Choose, wide: int, narrow: int) -> tuple[Tensor, Tensor]:
    """Prune block after block of columns; the columns behind compensate.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        factor: V of :func:`factor`, ``(groups, columns, columns)``.
        choose: Chooses what is kept of the next ``narrow`` columns.
        wide: Columns of the blocks to which all columns before them are applied in one product.
        narrow: Columns of the blocks in which choices are made; divides ``wide``.

    Returns:
        The new weights and what is kept, both ``(groups, rows, columns)``.

    References:
        Frantar and Alistarh, SparseGPT, ICML 2023, alg. 1 (arXiv:2301.00774).
    """
    new = torch.zeros_like(weights)
    change = torch.zeros_like(weights)
    keep = torch.ones_like(weights, dtype=torch.bool)
    columns = weights.shape[2]
    for start in range(0, columns, wide):
        block = slice(start, min(start + wide, columns))
        own = factor[:, block, block]
        eye = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
        inverse = torch.linalg.solve_triangular(own, eye.expand_as(own), upper=True)
        # The error is half the squared length of (W0 - W) V. Columns that are still free can bring their own part of
        # it to zero: that is their best value, given the columns before them.
        pull = change[..., :start] @ factor[:, :start, block]
        best = torch.baddbmm(weights[..., block], pull, inverse)
        left = best.transpose(1, 2).contiguous()  # a column lies in one piece
        kept = _prune_block_(left, inverse, choose, start, narrow)
        keep[..., block] = kept.transpose(1, 2)
        new[..., block] = left.transpose(1, 2)
        change[..., block] = weights[..., block] - new[..., block]
    return new, keep


def _prune_block_(left: Tensor, inverse: Tensor, choose: Choose, start: int, narrow: int) -> Tensor:
    """Prune a block in place, column by column, while those behind compensate; return what is kept.

    Args:
        left: The block's weights, ``(groups, columns, rows)``.
        inverse: Inverse of its own part of V, ``(groups, columns, columns)``.
        choose: Chooses what is kept of the next ``narrow`` columns.
        start: The block's first column.
        narrow: Columns in which choices are made.
    """
    keep = torch.empty_like(left, dtype=torch.bool)
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    for first in range(0, left.shape[1], narrow):
        last = min(first + narrow, left.shape[1])
        kept = choose(left[:, first:], diagonal[:, first:], start + first)
        errors = torch.empty_like(left[:, first:last])
        for j in range(first, last):
            error = errors[:, j - first]
            torch.div(left[:, j].masked_fill(kept[:, j - first], 0), diagonal[:, j, None], out=error)
            left[:, j:last].addcmul_(error[:, None], inverse[:, j, j:last, None], value=-1)
        # One product for the columns behind, instead of one for each removal.
        left[:, last:].baddbmm_(inverse[:, first:last, last:].transpose(1, 2), errors, alpha=-1)
        left[:, first:last].masked_fill_(~kept, 0)
        keep[:, first:last] = kept
    return keep
