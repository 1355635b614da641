"""Remembers a run's model, optimizers and learning-rate schedulers, and takes them back there."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_prune.model.devices import generators_restored
from lightning_prune.model.errors import PruningError
from lightning_prune.model.shards import settle_
from lightning_prune.surgery import restore_, take_snapshot

__all__ = ["draw_anew_", "remember", "rewind_"]


def remember(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Copy all that training changes of the model and of what trains it, as plain dicts and tensors."""
    settle_(pl_module)
    return {
        **take_snapshot(pl_module, trainer.optimizers),
        "settings": [copy.deepcopy(optimizer.state_dict()["param_groups"]) for optimizer in trainer.optimizers],
        "schedulers": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
    }


def rewind_(trainer: Trainer, pl_module: LightningModule, remembered: dict[str, Any]) -> None:
    """Restore parameters, buffers, optimizer state, learning rates and schedulers as they were remembered.

    Raises:
        PruningError: If an optimizer has other parameter groups than then.
    """
    now = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
    then = [len(groups) for groups in remembered["settings"]]
    if now != then:
        raise PruningError(
            f"The optimizers have {now} parameter groups, and had {then} at the step to rewind to: groups that were "
            "added since cannot be taken back. Give the optimizers all parameters from the start, or do not rewind."
        )
    settle_(pl_module)
    restore_(pl_module, trainer.optimizers, remembered)
    for optimizer, groups in zip(trainer.optimizers, remembered["settings"], strict=True):
        for group, was in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: copy.deepcopy(value) for name, value in was.items() if name != "params"})
    for config, was in zip(trainer.lr_scheduler_configs, remembered["schedulers"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(was))


def draw_anew_(pl_module: LightningModule, seed: int) -> None:
    """Draw the parameters of every module that has ``reset_parameters`` anew; the run's random numbers stay as are."""
    with generators_restored([pl_module.device]):
        torch.manual_seed(seed ^ zlib.crc32(b"draw anew"))
        for module in pl_module.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
