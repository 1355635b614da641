"""Finds the averages of a run's weights that other callbacks keep, so that they follow what happens to the weights."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averages", "restart_averages_"]


def averages(trainer: Trainer) -> list[nn.Module]:
    """Return the averaged models of Lightning's callbacks (EMA, SWA), with parameters named as the module's own."""
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    models = [model.module if isinstance(model, AveragedModel) else model for model in found]
    return [model for model in models if isinstance(model, nn.Module)]


def restart_averages_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let every average start anew from the weights as they are."""
    with torch.no_grad():
        for average in averages(trainer):
            for ours, theirs in (
                (pl_module.parameters(), average.parameters()),
                (pl_module.buffers(), average.buffers()),
            ):
                for own, averaged in zip(ours, theirs, strict=True):
                    averaged.copy_(own)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(model := getattr(callback, "_average_model", None), AveragedModel):
            model.n_averaged.zero_()
