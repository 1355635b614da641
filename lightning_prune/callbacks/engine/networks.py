"""Finds, in a run, the networks inside a module that are not pruned, and logs them; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.pruning.left_alone import left_alone

__all__ = ["networks_left_alone"]


def networks_left_alone(run: Run, named: Iterable[Any]) -> dict[str, str]:
    """Return the path of every network that is not pruned in this run, and why.

    What a callback such as ``BackboneFinetuning`` froze is trained later, so it is pruned.
    """
    kinds = {kind.__name__ for callback in run.trainer.callbacks for kind in type(callback).__mro__}  # type: ignore[attr-defined]
    found = left_alone(run.module, named, frozen="BaseFinetuning" not in kinds)
    for path, reason in found.items():
        rank_zero_info(f"{run.where}: {path} is left alone: {reason}. Name it to prune it.")
    return found
