r"""Optimal Brain Surgeon and Optimal Brain Damage on all weights of a small network together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Step", "add_outer_products", "damage", "inverse_of_outer_products", "magnitude", "surgeon"]


class Step(NamedTuple):
    """One removal: the weight's index, the predicted rise of the loss, and all weights afterwards."""

    which: int
    rise: float
    weights: Tensor


def inverse_of_outer_products(rows: Tensor, examples: int, alpha: float) -> Tensor:
    r"""Invert :math:`\alpha I + \frac{1}{P} \sum_k x_k x_k^T` by rank-one updates, without inverting it.

    Args:
        rows: The :math:`x_k`, ``(n, weights)``: derivatives of the outputs, times the root of the loss's curvature.
        examples: P.
        alpha: Damping; small, and above 0.

    Returns:
        ``(weights, weights)``.

    Raises:
        ValueError: If ``alpha`` is not above 0.

    Examples:
        >>> inverse_of_outer_products(torch.tensor([[1.0, 0.0]]), examples=1, alpha=1.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992, eqs. 9-11.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha!r}: the inverse Hessian starts at 1 / alpha. Pass a small number above 0.")
    start = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device) / alpha
    return add_outer_products(start, rows / examples**0.5)


def add_outer_products(inverse: Tensor, rows: Tensor, at_once: int = 32) -> Tensor:
    r"""Update an inverse for :math:`H + \sum_k x_k x_k^T` (Sherman and Morrison; for several rows at once, Woodbury).

    Args:
        inverse: :math:`H^{-1}`, ``(weights, weights)``.
        rows: The :math:`x_k`, ``(n, weights)``.
        at_once: Rows in one update; 1 gives the rank-one updates of the paper.

    Returns:
        A new inverse.
    """
    for part in rows.split(at_once):
        product = part @ inverse  # (k, weights)
        small = torch.eye(len(part), dtype=part.dtype, device=part.device) + product @ part.T
        inverse = inverse - product.T @ torch.linalg.solve(small, product)
    return inverse


def surgeon(weights: Tensor, inverse: Tensor) -> Step:
    r"""Remove the weight of least :math:`\frac{1}{2} w_q^2 / [H^{-1}]_{qq}` and update all others to compensate.

    Args:
        weights: All remaining weights, ``(n,)``.
        inverse: The inverse Hessian of the loss with respect to them, ``(n, n)``.

    References:
        Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992, eq. 5.
    """
    saliency = 0.5 * weights.square() / inverse.diagonal()
    q = int(saliency.argmin())
    moved = weights - weights[q] / inverse[q, q] * inverse[:, q]
    moved[q] = 0.0
    return Step(q, float(saliency[q]), moved)


def damage(weights: Tensor, diagonal: Tensor) -> Step:
    r"""Remove the weight of least :math:`\frac{1}{2} h_{qq} w_q^2`; no other changes.

    Args:
        weights: All remaining weights, ``(n,)``.
        diagonal: The Hessian's diagonal, ``(n,)``.

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, eq. 5.
    """
    return _zeroed(weights, 0.5 * diagonal * weights.square())


def magnitude(weights: Tensor) -> Step:
    """Remove the smallest weight; the predicted rise is NaN, since magnitudes predict none."""
    step = _zeroed(weights, weights.abs())
    return step._replace(rise=float("nan"))


def _zeroed(weights: Tensor, saliency: Tensor) -> Step:
    q = int(saliency.argmin())
    left = weights.clone()
    left[q] = 0.0
    return Step(q, float(saliency[q]), left)
