"""Criteria for single weights."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by its absolute value.

    Args:
        weight: Weights of any shape.

    Returns:
        One score per weight, of the same shape; higher is kept longer.

    Examples:
        >>> magnitude(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 2.]])

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015 (arXiv:1506.02626).
    """
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
