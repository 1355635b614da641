"""Optimal Brain Damage: the change of the loss, estimated from the diagonal of its Hessian."""

from __future__ import annotations

from torch import Tensor


def obd(weights: Tensor, hessian_diagonal: Tensor) -> Tensor:
    r"""Return the saliency :math:`\frac{1}{2} h_{kk} w_k^2` of each weight; that of a unit is the sum over its weights.

    Args:
        weights: Weights, any shape.
        hessian_diagonal: Second derivatives of the loss with respect to each, of the same shape.

    Returns:
        Saliencies, of the same shape; higher is kept longer.

    Examples:
        >>> obd(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0]))
        tensor([2., 2.])

    References:
        LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989, eq. 5.
    """
    return 0.5 * hessian_diagonal * weights.square()
