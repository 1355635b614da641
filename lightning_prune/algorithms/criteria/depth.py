r"""Criteria for whole layers: what is lost if a layer's output is replaced by its input."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.model.devices import widened

__all__ = ["block_influence", "first_order", "second_order"]


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    r"""Return how much a layer turns what passes through it: :math:`1 - \cos(x, y)`, its mean over positions.

    Args:
        before: What goes into the layer, x, ``(N, D)``, ``(N, positions, D)`` or ``(N, C, *positions)`` from four
            dimensions on, where the vectors are those of the channels.
        after: What comes out of it, y, of the same shape.

    Returns:
        A number in [0, 2].

    Examples:
        >>> block_influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2929)

    References:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv:2403.03853),
        eq. 1.
    """
    along = 1 if before.dim() > 3 else -1
    x, y = widened(before), widened(after)
    return (1 - torch.cosine_similarity(x, y, dim=along)).mean().to(torch.promote_types(before.dtype, torch.float32))


def first_order(change: Tensor, gradients: Tensor) -> Tensor:
    r"""Estimate how each example's loss changes, to first order: :math:`\Delta \cdot \partial L / \partial y`.

    Args:
        change: What removing the layer adds to its output, ``(N, ...)``: input minus output.
        gradients: The gradient of the mean loss with respect to the output, ``(N, ...)``.

    Returns:
        Signed change of the mean loss by each example, ``(N,)``.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019 (arXiv:1906.10771), with a layer
        in place of a filter.
    """
    product = widened(change) * widened(gradients)
    return product.flatten(1).sum(dim=1) if product.dim() > 1 else product


def second_order(change: Tensor, gradients: Tensor) -> Tensor:
    r"""Estimate how the mean loss changes, to second order, with Fisher's matrix in place of the Hessian.

    With the first-order change :math:`\delta_n` by each of N examples this is
    :math:`\sum_n \delta_n + \frac{N}{2} \sum_n \delta_n^2`.

    Args:
        change: Input minus output, ``(N, ...)``.
        gradients: The gradient of the mean loss with respect to the output, ``(N, ...)``.

    Returns:
        A single number.

    References:
        Theis et al., Faster Gaze Prediction with Dense Networks and Fisher Pruning, 2018 (arXiv:1801.05787).
    """
    found = first_order(change, gradients)
    return found.sum() + 0.5 * len(found) * found.square().sum()
