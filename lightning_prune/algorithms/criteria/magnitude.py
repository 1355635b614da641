"""Magnitude criteria for filters: norms of their weights, and scales of the normalisation behind them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["batch_norm_scale", "filter_l1", "filter_l2"]

_AT_ONCE = 2**18
"""Weights scored at a time: few enough to fit into a processor's cache."""


def filter_l1(weight: Tensor) -> Tensor:
    """Score each filter by the sum of its absolute weights.

    Args:
        weight: Convolution or linear weight, ``(out, in / groups, *kernel)``.

    Returns:
        One score per filter, ``(out,)``; higher is kept longer.

    Raises:
        ValueError: If ``weight`` has no dimensions.

    Examples:
        >>> filter_l1(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        tensor([3.0000, 0.5000])

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, sec. 3.1 (arXiv:1608.08710).
    """
    return _of_each(weight, lambda rows: rows.abs().sum(dim=1))


def filter_l2(weight: Tensor) -> Tensor:
    """Score each filter by the sum of its squared weights.

    Args:
        weight: Convolution or linear weight, ``(out, in / groups, *kernel)``.

    Returns:
        One score per filter, ``(out,)``; higher is kept longer.

    Raises:
        ValueError: If ``weight`` has no dimensions.

    Examples:
        >>> filter_l2(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        tensor([5.0000, 0.2500])

    References:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, sec. 4.4 (arXiv:1608.08710).
    """
    return _of_each(weight, lambda rows: rows.square().sum(dim=1))


def batch_norm_scale(weight: Tensor) -> Tensor:
    r"""Score each channel by the absolute scale :math:`|\gamma|` of the normalisation behind it.

    Args:
        weight: Scale of a BatchNorm, GroupNorm, LayerNorm or InstanceNorm, ``(channels,)``.

    Returns:
        One score per channel, ``(channels,)``; higher is kept longer.

    Examples:
        >>> batch_norm_scale(torch.tensor([0.5, -2.0]))
        tensor([0.5000, 2.0000])

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017 (arXiv:1708.06519).
    """
    return weight.detach().abs()


def _of_each(weight: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Score a few filters at a time, so that no temporary tensor is as large as the weight."""
    if not weight.dim():
        raise ValueError("weight: got a single number; a filter criterion needs a weight of shape (out, ...).")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows_at_once = max(1, _AT_ONCE // max(1, math.prod(weight.shape[1:])))
    scores = []
    for rows in weight.detach().split(rows_at_once):
        scores.append(score(rows.reshape(len(rows), -1).to(dtype)))
    return torch.cat(scores)
