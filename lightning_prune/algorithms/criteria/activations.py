"""Activation statistics as criteria: mean, standard deviation and average percentage of zeros (APoZ)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["activation_mean", "activation_std", "apoz"]


def activation_mean(total: Tensor, squares: Tensor, zeros: Tensor, count: Tensor) -> Tensor:
    """Score each channel by its mean activation.

    Args:
        total: Sum of the channel's activations, ``(C,)``.
        squares: Sum of their squares, ``(C,)``.
        zeros: Number of those that are zero, ``(C,)``.
        count: Number of activations summed, ``(C,)``.

    Returns:
        One score per channel, ``(C,)``; higher is kept longer.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, sec. 2.2 (arXiv:1611.06440).
    """
    return total / count


def activation_std(total: Tensor, squares: Tensor, zeros: Tensor, count: Tensor) -> Tensor:
    """Score each channel by the standard deviation of its activations; arguments as in :func:`activation_mean`.

    Returns:
        One score per channel, ``(C,)``; higher is kept longer.

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, sec. 2.2 (arXiv:1611.06440).
    """
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()


def apoz(total: Tensor, squares: Tensor, zeros: Tensor, count: Tensor) -> Tensor:
    """Score each channel by the share of its activations that are not zero; arguments as in :func:`activation_mean`.

    Returns:
        One score per channel, ``(C,)``: one minus the average percentage of zeros; higher is kept longer.

    References:
        Hu et al., Network Trimming, 2016, eq. 1 (arXiv:1607.03250).
    """
    return 1 - zeros / count
