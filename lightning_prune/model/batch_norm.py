"""Recalibration of BatchNorm statistics after a pruning step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_prune.model.calls import call_on
from lightning_prune.model.errors import PruningError
from lightning_prune.model.sandbox import unchanged, undisturbed
from lightning_prune.model.torch_modes import trainable_afterwards

__all__ = ["batch_norms", "recalibrate_batch_norm"]


@trainable_afterwards
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[str, ...]:
    """Replace the running means and variances of BatchNorm layers by plain averages over some batches.

    After a pruning step, the inputs of later layers no longer match their running statistics, so a model evaluated
    before further training looks worse than it is. Nothing is trained: weights, gradients, modes, momenta, random
    numbers and all other buffers keep their values. BatchNorm layers alone run in train mode, all others (dropout, for
    example) in eval mode. In a model in train mode, BatchNorm layers in eval mode count as frozen and are left alone.

    Args:
        model: The model; only ``running_mean`` and ``running_var`` of its BatchNorm layers change.
        batches: Batches of data, read once.
        forward: Calls the model on a batch. By default, a tuple or list holds the positional inputs, a mapping the
            keyword inputs, and anything else is the one input.

    Returns:
        Paths of the layers whose statistics were replaced.

    Raises:
        PruningError: If there are such layers and no batches.

    Examples:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate_batch_norm(nn.Sequential(norm), [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        ('0',)
        >>> norm.running_mean, norm.running_var
        (tensor([4.]), tensor([2.]))

    References:
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, sec. 3 (arXiv:2105.07576).
    """
    found = batch_norms(model)
    if not found:
        return ()
    seen = 0
    with undisturbed(model):
        for norm in found.values():
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None averages all batches alike
        for batch in batches:
            seen += 1
            with unchanged(batch):
                (forward or call_on)(model, batch)
        averaged = {}
        for path, norm in found.items():
            if norm.num_batches_tracked:  # layers that no batch reached keep their statistics
                averaged[path] = (norm.running_mean.clone(), norm.running_var.clone())
    if not seen:
        raise PruningError("recalibrate_batch_norm: batches is empty. Pass at least one batch.")
    with torch.no_grad():
        for path, (mean, var) in averaged.items():
            found[path].running_mean.copy_(mean)
            found[path].running_var.copy_(var)
    return tuple(averaged)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorm layers whose statistics follow the data; in a model in train mode, those in train mode."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        frozen = model.training and not module.training
        if not frozen:
            found[path] = module
    return found
