r"""ADMM: prunes all rows of a layer together by alternating directions, with matrix products alone.

Dense weights, which minimise the error, and sparse weights are drawn together by a growing penalty :math:`\rho`: at
first the support may change freely, in the end it is fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["alternate"]

_FIRST, _GROWTH = 0.003, 1.1  # of rho, in mean diagonal entries of H; found by trying: slower finds a little better


def alternate(weights: Tensor, hessian: Tensor, choose: Callable[[Tensor], Tensor], rounds: int = 600) -> Tensor:
    r"""Choose which weights to keep so that :math:`\frac{1}{2}\operatorname{tr}((W - W_0) H (W - W_0)^T)` is small.

    Args:
        weights: Rows of weights, ``(groups, rows, columns)``.
        hessian: Positive definite, ``(groups, columns, columns)``.
        choose: From scores, in the shape of ``weights``, to the mask of what is kept.
        rounds: Iterations at most; it stops when the choice is the same as three rounds before.

    Returns:
        True for each weight that is kept, ``(groups, rows, columns)`` bool.

    References:
        Boyd et al., Distributed Optimization via ADMM, 2011, sec. 9.1; Meng et al., ALPS, NeurIPS 2024
        (arXiv:2406.07831).
    """
    values, vectors = torch.linalg.eigh(hessian)  # one factorisation serves every rho
    values = values[:, None]
    pull = weights @ hessian
    rho = _FIRST * hessian.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    sparse, dual = weights, torch.zeros_like(weights)
    keep = choose(weights.abs())
    for i in range(rounds):
        # The dense weights solve W (H + rho I) = W0 H - dual + rho sparse, in the eigenbasis of H.
        wanted = pull - dual + rho * sparse
        dense = (wanted @ vectors / (values + rho)) @ vectors.transpose(1, 2)
        aim = dense + dual / rho
        chosen = choose(aim.abs())
        sparse = aim * chosen
        dual = dual + rho * (dense - sparse)
        if i % 3 < 2:  # the penalty grows every third round
            continue
        if torch.equal(chosen, keep):
            break
        keep = chosen
        rho = rho * _GROWTH
    return keep
