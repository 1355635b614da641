"""Averages BatchNorm's statistics anew over some batches; changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_prune.model.calls import call_on, undisturbed
from lightning_prune.model.errors import PruningError
from lightning_prune.model.inference_mode import changes_model

__all__ = ["batch_norms", "recalibrate_batch_norm"]


@changes_model
def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[str, ...]:
    """Let BatchNorm see what it now gets: its means and variances become plain averages over some batches.

    After a cut, layers behind it receive other numbers than those that their running statistics tell of, so a model
    that is evaluated before it has trained on looks worse than it is. Nothing is trained: weights, gradients, modes,
    momenta, random numbers and every other buffer stay as they are. BatchNorm layers alone run in train mode, the rest
    (dropout, say) in eval mode. In a model that is being trained, BatchNorm layers in eval mode are taken for frozen
    and stay.

    Args:
        model: The model; only ``running_mean`` and ``running_var`` of its BatchNorm layers change.
        batches: Batches of data; a list or loader that can be read once.
        forward: Calls the model on a batch; by default a tuple or list is taken for its positional inputs, a mapping
            for its keyword inputs and all else for its one input.

    Returns:
        Paths of the layers whose statistics were averaged.

    Raises:
        PruningError: If there are such layers and no batch came.

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
            (forward or call_on)(model, batch)
        averaged = {
            path: (norm.running_mean.clone(), norm.running_var.clone())
            for path, norm in found.items()
            if norm.num_batches_tracked  # what no batch reached keeps what it has
        }
    if not seen:
        raise PruningError("recalibrate_batch_norm: no batch came. Pass batches that can be read.")
    with torch.no_grad():
        for path, (mean, var) in averaged.items():
            found[path].running_mean.copy_(mean)
            found[path].running_var.copy_(var)
    return tuple(averaged)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorm layers whose statistics follow the data: while a model trains, those in train mode."""
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }
    live = {path: module for path, module in found.items() if module.training}
    return live if model.training else found
