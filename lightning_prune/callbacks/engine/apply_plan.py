"""Removes units or layers in a run: from the model, its averages, optimizers and what wraps it in several processes."""

from __future__ import annotations

from dataclasses import replace

from lightning_prune.callbacks.engine.averaging import averaged_copies, cut_copies_
from lightning_prune.callbacks.engine.guard import companions
from lightning_prune.callbacks.engine.processes import replicated_anew
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.pruning.layer_plan import LayerPlan
from lightning_prune.pruning.layer_repair import LayerRepair
from lightning_prune.pruning.layers import apply_layers_
from lightning_prune.pruning.plan import Plan
from lightning_prune.surgery import Cut, recipe_of
from lightning_prune.surgery.depth import remove_layers_

__all__ = ["apply_plan_", "apply_removal_"]


def apply_plan_(run: Run, plan: Plan) -> str:
    """Make a cut.

    Returns:
        Why a config cannot express the pruned model, in words; empty if it can.
    """
    recipe_of(run.module).needed = True  # before guards save what state dicts say
    run.before_step()
    with replicated_anew(run.where, run.trainer, run.module):
        _, inexpressible = plan.write_(run.trainer.optimizers)
        cut_copies_(run.trainer, run.module, plan.cut)
    for member in run.members:
        member.strategy.after_cut(replace(run, own=member), plan)
    for companion in companions(run.trainer):
        companion.after_cut(run.trainer, run.module, plan.cut)
    return inexpressible


def apply_removal_(run: Run, plan: LayerPlan, repair: LayerRepair) -> None:
    """Remove layers, and write what was refitted."""
    run.before_step()
    with replicated_anew(run.where, run.trainer, run.module):
        apply_layers_(run.module, plan, repair, run.trainer.optimizers)
        for copy in averaged_copies(run.trainer):
            remove_layers_(copy, plan.skips)
    for companion in companions(run.trainer):
        companion.after_cut(run.trainer, run.module, Cut({}, {}, {}, ()))
