"""Removes layers of a model in a run: scores, plan and removal; neither logs nor says when."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.callbacks.engine.apply_plan import apply_removal_
from lightning_prune.callbacks.engine.batches import losses_of, training_batches
from lightning_prune.callbacks.engine.example_inputs import inputs_of
from lightning_prune.callbacks.engine.layer_arguments import LayerArguments
from lightning_prune.callbacks.engine.layer_state import DenseLayers, LayerState
from lightning_prune.callbacks.engine.processes import calibration_of, over_processes, recalibrate_
from lightning_prune.callbacks.engine.refusals import refuse_not_finite
from lightning_prune.callbacks.engine.sharding import whole_model
from lightning_prune.callbacks.engine.strategy import Run
from lightning_prune.callbacks.engine.whole_removal import WholeRemoval
from lightning_prune.model.calls import modules_of, run
from lightning_prune.pruning.amounts import fraction_of
from lightning_prune.pruning.arguments import part_of
from lightning_prune.pruning.layer_plan import LayerBudget, LayerCosts, LayerPlan, Skips, plan_layers
from lightning_prune.pruning.layer_repair import LayerRepair, repaired_layers
from lightning_prune.pruning.layer_scores import LayerData
from lightning_prune.pruning.layers import apply_layers_, ignored_layers, prunable_layers, time_without
from lightning_prune.pruning.layers_and_filters import PlanCut, Split, SplitAsk, choose_split
from lightning_prune.pruning.repair import DAMPING
from lightning_prune.pruning.report_types import Repair
from lightning_prune.reports.history import Goal
from lightning_prune.structure.skippable import Depth
from lightning_prune.surgery.pass_through import skip_of
from lightning_prune.surgery.remove_layers import close_gaps_, open_gaps_, remove_layers_

__all__ = ["LayerRemoval", "copy_in_run"]

_OF_LOSS = ("taylor", "taylor_second_order", "loss")


class LayerRemoval(WholeRemoval):
    """The strategy of the callback that removes layers; a part of those that remove layers and filters.

    Args:
        arguments: What the user asked for.

    Attributes:
        state: Everything that changes.
        repairs: What was refitted at the last pruning step.
    """

    arguments: LayerArguments
    kind = "layers"
    or_together = ", or remove layers and filters by FilterPruning(layers=True)"
    state_class = LayerState
    state: LayerState
    repairs: tuple[Repair, ...] = ()

    @property
    def dense(self) -> DenseLayers:
        """The dense model."""
        assert self.state.dense is not None  # set before anything is planned
        return self.state.dense

    @property
    def before(self) -> tuple[int, int]:
        """Parameters and multiply-adds of the dense model."""
        return self.dense.costs.params, self.dense.costs.flops

    def kept(self) -> dict[str, float]:
        """Return the share of the layers that were removed, and of the latency that is left."""
        values = {"prune/sparsity": self.dense.costs.share_gone("layers", self.state.removed)}
        if self.arguments.target == "latency":
            values["prune/latency_kept"] = self.state.latency
        return values

    def reads_batches(self, pl_module: LightningModule) -> bool:
        """Return that layers are scored on training batches."""
        return True

    @property
    def reads_losses(self) -> bool:
        """Whether layers are scored by the training step's loss."""
        return self.arguments.criterion in _OF_LOSS

    def prepare(self, run: Run, batch: Any | None) -> bool:
        """Look at the model on known inputs, or on the first batch that holds any; refuse what cannot be reached."""
        if self.state.dense is not None:
            open_gaps_(run.module)  # so that layers have the names that they had when pruning began
        if not self.look(run, batch):
            return False
        if self.state.dense is not None and not run.own.clock.unfinished:
            return True  # there may be no layer left to remove
        refuse_not_finite(run.where, run.module, dict(run.module.named_parameters()))
        depth = self._depth(run.module)
        if self.state.dense is None:
            costs = LayerCosts.of(run.module, depth, self.flops(run.module), self.part(run.module))
            self.state.dense = DenseLayers(costs, self.costs(run.module))
        if run.own.clock.unfinished:
            budget = self._budget(depth, self._amount)
            budget.check_reach(run.where, depth, self.dense.costs, self.state.removed)
        return True

    def prune_to(self, run: Run, progress: float) -> None:
        """Remove layers up to the share that the schedule asks for at ``progress``."""
        module, asked = run.module, run.own.schedule.sparsity(progress, self._amount)
        refuse_not_finite(run.where, module, dict(module.named_parameters()))
        depth = self._depth(module)
        timing = partial(self._time_of_first, run) if self.arguments.target == "latency" else None
        with self._data(run, self.reads_losses) as data:
            plan = plan_layers(
                module, self.inputs, depth, self.dense.costs, self._budget(depth, asked), self.arguments.criterion,
                data, self.state.gone, timing, self.state.refused,
            )  # fmt: skip
        self.state.refused, self.state.pinned = dict(plan.refused), {**depth.others, **plan.refused}
        if plan.removed:
            repair = LayerRepair({}, (), {})
            if self.arguments.repair:
                with calibration_of(run.trainer, module, self.arguments.batches, self.traces) as calibration:
                    repair = repaired_layers(module, plan.skips, calibration, DAMPING)
            self._apply(run, plan, repair)
        if plan.latency_kept is not None:
            self.state.latency = plan.latency_kept
        if plan.short and progress >= 1.0 and not self.state.warned:
            self.state.warned = True
            rank_zero_warn(f"{run.where}: {plan.short}")

    def remove_some(self, run: Run, amount: float, plan_cut: PlanCut) -> Split:
        """Remove as many layers as lose least if filters make up the rest of an amount, of the model as it is."""
        asked, module = self.arguments, run.module
        timing = None
        if asked.target == "latency":
            timing = partial(self._time_of_first, run, whole=False)
        refits = calibration_of(run.trainer, module, asked.batches, self.traces) if asked.repair else nullcontext()
        with self._data(run, module.automatic_optimization) as data, refits as calibration:
            ask = SplitAsk(
                amount, asked.target, self.part(module), asked.ignore, self._alone, data, calibration, DAMPING, timing,
                copy_in_run, self.dense.costs.by_layer.keys(),
            )  # fmt: skip
            split = choose_split(module, self.inputs, ask, plan_cut)
        if split.layers.removed:
            self._apply(run, split.layers, split.repair)
        return split

    def without_most(self, pl_module: LightningModule) -> LightningModule:
        """Return a copy that has lost all layers but one."""
        depth, twin = self._depth(pl_module), copy_in_run(pl_module)
        remove_layers_(twin, {path: skip_of(depth.layers[path]) for path in depth.outermost[1:]})
        return twin

    def goal(self, run: Run) -> Goal:
        """Return what was asked and what is reached now."""
        target = self.arguments.target
        reached = self.dense.costs.share_gone(target, self.state.removed)
        if target == "latency":
            reached = 1 - self.state.latency
        return Goal(run.where, target, self._amount, reached)

    def after_training(self, run: Run) -> None:
        """Have the config of a Hugging Face model say which layers are left, or warn that it cannot."""
        if self.state.removed:
            with whole_model(run.where, run.trainer, run.module):
                told = close_gaps_(run.module, self.inputs)
            if told:
                rank_zero_warn(f"{run.where}: {told}")

    def rollback_state(self) -> dict[str, Any]:
        """Return the removed layers and the latency."""
        plain = self.state.to_plain()
        return {"removed": plain["removed"], "latency": plain["latency"]}

    def rollback(self, run: Run, state: dict[str, Any]) -> None:
        """Follow a model that is as it was before the last pruning step."""
        self.state = LayerState.from_plain({**self.state.to_plain(), **state})
        self._flops = None

    def _depth(self, pl_module: LightningModule) -> Depth:
        part = part_of(pl_module, self.arguments.module)
        depth = prunable_layers(pl_module, self.inputs, part, self.arguments.ignore, self._alone)
        if self.state.dense is not None:
            depth = depth.within(self.state.dense.costs.by_layer)
        self.state.pinned = {**depth.others, **self.state.refused}
        return depth

    @property
    def _amount(self) -> float:
        """The fraction of the target that is removed in the end, relative to the dense model."""
        return fraction_of(self.arguments.amount, int(self.dense.costs.whole("layers")), "layers")

    def _budget(self, depth: Depth, amount: float) -> LayerBudget:
        asked = self.arguments.budget
        return replace(asked, amount=amount, min_layers=max(0, asked.min_layers - ignored_layers(depth)))

    @contextmanager
    def _data(self, run_: Run, of_loss: bool) -> Iterator[LayerData]:
        """Yield training batches of each process, and what runs the model on them; scores are means over processes."""
        trainer, module = run_.trainer, run_.module

        mean = partial(over_processes, trainer, module, "mean")
        with training_batches(trainer, module, self.arguments.batches) as batches:
            if of_loss:
                with losses_of(module) as loss:
                    yield LayerData(list(batches), run, loss, mean)
            else:
                yield LayerData(list(inputs_of(module, batches, self.traces)), run, None, mean)

    def _time_of_first(self, run: Run, skips: Skips, whole: bool = True) -> float:
        """Measure on the first process, and tell the others."""
        kept = 1.0
        if run.trainer.is_global_zero:
            with run.trainer.precision_plugin.forward_context():
                kept = time_without(run.module, self.inputs, skips, whole)
        return float(run.trainer.strategy.broadcast(kept))

    def _apply(self, run: Run, plan: LayerPlan, repair: LayerRepair) -> None:
        """Remove layers, and note when."""
        when = f"epoch {run.trainer.current_epoch}, step {run.trainer.global_step}"
        if self.arguments.repair:
            self.repairs = repair.repairs
        repair = replace(repair, tensors=run.trainer.strategy.broadcast(repair.tensors))
        apply_removal_(
            run,
            lambda model: apply_layers_(model, plan, repair, run.trainer.optimizers),
            lambda copied: remove_layers_(copied, plan.skips),
        )
        self.state.removed |= {layer.path: (layer, when) for layer in plan.removed}
        self._flops = None
        recalibrate_(run.trainer, run.module, self.arguments.recalibrate, self.traces)


def copy_in_run(pl_module: Any) -> LightningModule:
    """Return a copy of a module that knows its Trainer, which a plain copy loses."""
    memo: dict[int, Any] = {}
    for _, module in modules_of(pl_module):
        for leaf in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:  # such as a loss that was kept, which torch cannot copy
                memo[id(leaf)] = leaf.detach()
    twin: LightningModule = copy.deepcopy(pl_module, memo)
    twin.trainer = pl_module.trainer
    return twin
