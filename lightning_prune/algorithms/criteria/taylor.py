"""First-order Taylor criteria: the estimated change of the loss when a unit is removed."""

from __future__ import annotations

import torch
from torch import Tensor


def taylor_activations(activations: Tensor, gradients: Tensor) -> Tensor:
    r"""Expand the loss of every example in the feature maps: :math:`\sum_m a_m \, \partial L / \partial a_m`.

    The criterion is the mean over examples of the absolute value. The paper's mean over positions differs by a factor
    that is the same for a whole layer, and goes with the layer-wise normalisation.

    Args:
        activations: Feature maps, ``(N, C, *positions)``.
        gradients: The loss's gradient with respect to them, ``(N, C, *positions)``.

    Returns:
        Signed change of each example's loss for each channel, ``(N, C)``.

    Examples:
        >>> taylor_activations(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, -1.0]]]))
        tensor([[-1.5000]])

    References:
        Molchanov et al., Pruning CNNs for Resource Efficient Inference, ICLR 2017, eq. 8 (arXiv:1611.06440).
    """
    if activations.dim() == 2:  # no positions to sum over
        return activations * gradients
    return torch.linalg.vecdot(activations.flatten(2), gradients.flatten(2))
