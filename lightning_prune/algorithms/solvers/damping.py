"""Inverts Hessians, damped by what the caller states; one that stays singular is refused, never replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.model.errors import PruningError

__all__ = ["damped", "inverse"]

_NOTHING = 1e-4  # of a mean square; below, a variance damped by a hundredth drowns in the rounding of single precision


def damped(hessian: Tensor, fraction: float, whole: Tensor | None = None) -> Tensor:
    r"""Add to the diagonal: :math:`H + \lambda I`, :math:`\lambda` a fraction of the mean of the diagonal.

    Inputs that never vary leave nothing in H but rounding, and any weights serve as well; then what is added is a
    fraction of more than that mean, so that they stay what they are held on to.

    Args:
        hessian: Symmetric, positive semi-definite matrices, ``(..., n, n)``.
        fraction: Share of each matrix's own mean diagonal entry that is added; 0 adds nothing.
        whole: The matrices before means were taken off, ``(..., n, n)``, where H is of what is left.

    Returns:
        New matrices of the same shape.

    Raises:
        ValueError: If ``fraction`` is negative.

    Examples:
        >>> damped(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.5)
        tensor([[4., 0.],
                [0., 2.]])
    """
    if not fraction >= 0:
        raise ValueError(f"damping={fraction!r}: it is a share of the mean diagonal entry, from 0. Write 0.01 for 1 %.")
    own, least = (h.diagonal(dim1=-2, dim2=-1).mean(dim=-1) for h in (hessian, hessian if whole is None else whole))
    mean = own.maximum(_NOTHING * least)
    added = fraction * mean.where(mean > 0, 1)
    return hessian + added[..., None, None] * torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)


def inverse(hessian: Tensor) -> Tensor:
    """Invert symmetric, positive definite matrices by their Cholesky factors.

    Args:
        hessian: ``(..., n, n)``.

    Returns:
        Inverses, ``(..., n, n)``.

    Raises:
        PruningError: If one is not positive definite to working precision.
    """
    return torch.cholesky_inverse(cholesky(hessian))


def cholesky(matrix: Tensor) -> Tensor:
    """Return lower Cholesky factors, ``(..., n, n)``.

    Raises:
        PruningError: If a matrix holds what is not finite, or is not positive definite to working precision.
    """
    if not matrix.isfinite().all():
        raise PruningError(
            f"The Hessian, {matrix.shape[-1]} x {matrix.shape[-1]}, holds NaN or infinity: so do the batches, or what "
            "the layers before make of them. Pass data that is finite, to a model that is."
        )
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise PruningError(
            f"The Hessian, {matrix.shape[-1]} x {matrix.shape[-1]}, is singular to working precision: leading minor "
            f"{int(failed.max())} is not positive. Pass more data, or damping= (0.01 adds a hundredth of the mean "
            "diagonal entry)."
        )
    return factor
