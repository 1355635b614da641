"""Makes a planned cut in a run: the model, its averages, its optimizers, and what wraps it in several processes."""

from __future__ import annotations

from dataclasses import replace

from torch.nn.parallel import DistributedDataParallel

from lightning_prune.callbacks.engine.averaging import cut_copies_
from lightning_prune.callbacks.engine.guard import companions
from lightning_prune.callbacks.engine.processes import refuse_apart
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.pruning.plan import Plan
from lightning_prune.surgery import recipe_of

__all__ = ["apply_plan_"]


def apply_plan_(run: Run, plan: Plan) -> str:
    """Make a cut; where processes average gradients, what averages them is made anew for the new shapes.

    Returns:
        Why a config cannot express the pruned model, in words; empty if it can.
    """
    strategy = run.trainer.strategy
    averaged = isinstance(strategy.model, DistributedDataParallel)
    if averaged:
        strategy.model = run.module
    recipe_of(run.module).needed = True  # before guards save what state dicts say
    run.before_step()
    _, inexpressible = plan.write_(run.trainer.optimizers)
    cut_copies_(run.trainer, run.module, plan.cut)
    if averaged:
        refuse_apart(run.where, run.trainer, run.module)  # wrapping anew sends the first process's weights to all
        strategy.configure_ddp()  # type: ignore[attr-defined]
    for member in run.members:
        member.strategy.after_cut(replace(run, own=member), plan)
    for companion in companions(run.trainer):
        companion.after_cut(run.trainer, run.module, plan.cut)
    return inexpressible
