"""Finds, in a run, the networks inside a module that are not pruned, and logs them; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prune.callbacks.engine.packages import callbacks_named
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.model.calls import ExampleInputs
from lightning_prune.pruning.left_alone import left_alone, without_written

__all__ = ["networks_left_alone", "not_saved"]


def networks_left_alone(run: Run, named: Iterable[Any], inputs: ExampleInputs | None = None) -> dict[str, str]:
    """Return the path of every network that is not pruned in this run, and why.

    What a callback such as ``BackboneFinetuning`` froze is trained later, so it is pruned; so is what the module writes
    when it runs on ``inputs``.
    """
    unfreezes = bool(callbacks_named(run.trainer, "BaseFinetuning"))
    trained = set()
    for optimizer in run.trainer.optimizers:
        for group in optimizer.param_groups:
            trained |= set(map(id, group["params"]))
    own = set(map(id, run.module.parameters()))
    # Some strategies give optimizers other tensors than the module's, which say nothing of these.
    found = left_alone(run.module, named, not unfreezes, trained if trained <= own else ())
    if inputs is not None:
        found = without_written(run.module, inputs, found)
    for path, reason in found.items():
        rank_zero_info(f"{run.where}: {path} is left alone: {reason}. Name it to prune it.")
    return found


def not_saved(module: nn.Module) -> dict[str, str]:
    """Return the parameters that a module's own ``state_dict`` leaves out, with the reason why they are not pruned."""
    saved = module.state_dict()
    places = {value.data_ptr() for value in saved.values() if isinstance(value, Tensor)}  # it may rename others
    reason = "state_dict leaves it out, so no checkpoint would hold what is left of it"
    own = {name: value for name, value in module.named_parameters() if name not in saved and value.numel()}
    return {name: reason for name, value in own.items() if value.data_ptr() not in places}
