"""Removes units, layers or experts in a run: from the model, its averages, optimizers and what wraps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning.pytorch import LightningModule
from torch import nn

from lightning_prune.callbacks.engine.averaging import averaged_copies, cut_copies_
from lightning_prune.callbacks.engine.guard import companions
from lightning_prune.callbacks.engine.processes import replicated_anew
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.user_averages import cut_tables_
from lightning_prune.pruning.plan import Plan
from lightning_prune.surgery import Cut, recipe_of

__all__ = ["apply_plan_", "apply_removal_"]


def apply_plan_(run: Run, plan: Plan) -> str:
    """Make a cut.

    Returns:
        Why a config cannot express the pruned model, in words; empty if it can.
    """
    recipe_of(run.module).needed = True  # before guards save what state dicts say
    run.before_step()
    with replicated_anew(run.where, run.trainer, run.module):
        averages = run.averages.moving(run.trainer, run.module)
        _, inexpressible = plan.write_(run.trainer.optimizers)
        cut_copies_(run.trainer, run.module, plan.cut)
        cut_tables_(averages, plan.cut)
    for member in run.members:
        member.strategy.after_cut(replace(run, own=member), plan)
    for companion in companions(run.trainer):
        companion.after_cut(run.trainer, run.module, plan.cut)
    return inexpressible


def apply_removal_(
    run: Run, remove: Callable[[LightningModule], None], remove_of_copy: Callable[[nn.Module], None]
) -> None:
    """Remove modules as a whole.

    Args:
        run: The run.
        remove: Removes them from the module, and what optimizers hold of them.
        remove_of_copy: Removes them from a copy that averages weights.
    """
    run.before_step()
    with replicated_anew(run.where, run.trainer, run.module):
        remove(run.module)
        for copy in averaged_copies(run.trainer):
            remove_of_copy(copy)
    for companion in companions(run.trainer):
        companion.after_cut(run.trainer, run.module, Cut({}, {}, {}, ()))
