"""Damping and inversion of Hessians; a singular one raises an error."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.model.errors import PruningError

__all__ = ["cholesky", "damp_", "damped", "inverse", "mean_diagonal"]

_NOTHING = 1e-4  # of a mean square; a smaller variance, damped by 0.01, is lost in the rounding of single precision


def damped(hessian: Tensor, fraction: float, whole: Tensor | None = None) -> Tensor:
    r"""Add to the diagonal: :math:`H + \lambda I`, :math:`\lambda` a fraction of the mean of the diagonal.

    If inputs never vary, H without their mean holds only rounding errors. Then lambda is a fraction of a small part of
    the diagonal of ``whole``, so that the weights stay close to those that the damping holds them to.

    Args:
        hessian: Symmetric, positive semi-definite matrices, ``(..., n, n)``.
        fraction: Fraction of each matrix's own mean diagonal entry to add; 0 adds nothing.
        whole: The same matrices with means, ``(..., n, n)``, if H is a covariance.

    Returns:
        New matrices of the same shape.

    Raises:
        ValueError: If ``fraction`` is negative.

    Examples:
        >>> damped(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.5)
        tensor([[4., 0.],
                [0., 2.]])
    """
    new = hessian.clone()
    damp_(new, fraction, None if whole is None else mean_diagonal(whole))
    return new


def damp_(hessian: Tensor, fraction: float, whole: Tensor | None = None) -> Tensor:
    """Add to the diagonal as :func:`damped` does, in place.

    Args:
        hessian: ``(..., n, n)``.
        fraction: Fraction of each matrix's own mean diagonal entry to add; 0 adds nothing.
        whole: Mean diagonal entries of the same matrices with means, ``(...)``, if H is a covariance.

    Returns:
        What was added to each entry of the diagonal, ``(...)``.

    Raises:
        ValueError: If ``fraction`` is negative.
    """
    if not fraction >= 0:
        raise ValueError(f"damping={fraction!r}: must be a fraction of the mean diagonal entry, from 0; 0.01 is 1 %.")
    mean = mean_diagonal(hessian)
    if whole is not None:
        mean = mean.maximum(_NOTHING * whole)
    added = fraction * mean.where(mean > 0, 1)  # of a matrix of zeros too, which could not be inverted otherwise
    hessian.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    return added


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
        PruningError: If a matrix has entries that are not finite, or is not positive definite to working precision.
    """
    if not matrix.isfinite().all():
        raise PruningError(
            f"The Hessian, {matrix.shape[-1]} x {matrix.shape[-1]}, holds NaN or infinity, as do the batches or the "
            "activations of earlier layers. Pass finite data, and check the model's weights."
        )
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        raise PruningError(
            f"The Hessian, {matrix.shape[-1]} x {matrix.shape[-1]}, is singular to working precision: leading minor "
            f"{int(failed.max())} is not positive. Pass more data, or damping= (0.01 adds a hundredth of the mean "
            "diagonal entry)."
        )
    return factor


def mean_diagonal(matrices: Tensor) -> Tensor:
    """Return the mean diagonal entry of each matrix, ``(...)``."""
    return matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
