"""Removes units of a model in a run: scores, plan and cut; neither logs nor says when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.apply_plan import apply_plan_
from lightning_prune.callbacks.engine.clock import share_due
from lightning_prune.callbacks.engine.consumer_repair import ConsumerRepair
from lightning_prune.callbacks.engine.example_inputs import on_device_of, refuse_cut_steps
from lightning_prune.callbacks.engine.fade import Fade, steps_until
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.callbacks.engine.gathering import Gathering
from lightning_prune.callbacks.engine.kept_sums import of_kept_units
from lightning_prune.callbacks.engine.layer_removal import LayerRemoval
from lightning_prune.callbacks.engine.networks import networks_left_alone, not_saved
from lightning_prune.callbacks.engine.processes import latency_of_first, recalibrate_
from lightning_prune.callbacks.engine.refusals import (
    refuse_blind,
    refuse_not_finite,
    refuse_other_part,
    refuse_removal,
    refuse_shared,
    refuse_unseen,
)
from lightning_prune.callbacks.engine.removal_state import RemovalState, Start
from lightning_prune.callbacks.engine.sharding import (
    is_model_parallel,
    refuse_tensor_parallel,
    tensor_parallel_size,
)
from lightning_prune.callbacks.engine.step import refuse_step
from lightning_prune.callbacks.engine.strategy import Coming, Run, Strategy
from lightning_prune.callbacks.engine.traced_model import Narrow, TracedModel, written_with
from lightning_prune.measure.footprint import Footprint
from lightning_prune.model.batch_norm import batch_norms
from lightning_prune.model.errors import OutOfReachError, PruningError
from lightning_prune.pruning.arguments import check_optimizers, check_prunable
from lightning_prune.pruning.budget import Scores
from lightning_prune.pruning.outcome import outcome_of
from lightning_prune.pruning.plan import Plan, plan_filters
from lightning_prune.pruning.scoring import score_units
from lightning_prune.reports import Goal
from lightning_prune.structure import Keep, Structure, named_tensors
from lightning_prune.surgery import recipe_of
from lightning_prune.surgery.cut import Cut
from lightning_prune.surgery.resize import refuse_unfitting

__all__ = ["UnitRemoval"]

Adjust = Callable[[Structure, Scores], Scores]
"""Changes scores before units are selected."""

_ENOUGH = 100  # batches, in which optimizers that take turns have all had some


class UnitRemoval(Strategy):
    """The strategy of the callbacks that remove filters, neurons and channels.

    Args:
        arguments: What the user asked for.
        gathering: Where scores come from.
        repair: Compensates for pruned units, if asked for.
        adjust: Changes scores before units are selected.
        narrow: Leaves out groups that the criterion cannot score.
        batches: Training batches of each process on which layers are scored, if any may be removed.
    """

    def __init__(
        self,
        arguments: FilterArguments,
        gathering: Gathering,
        repair: ConsumerRepair | None = None,
        adjust: Adjust | None = None,
        narrow: Narrow | None = None,
        batches: int = 8,
    ) -> None:
        self.arguments: FilterArguments = arguments
        self.gathering = gathering
        self.example_inputs = arguments.example_inputs
        self.traces = gathering.traces = arguments.trace
        self.state = RemovalState()
        self.traced = TracedModel(arguments, narrow)
        self._repair, self._adjust = repair, adjust
        self._rehearsal: tuple[Structure, Cut | None] | None = None  # the groups, and all that will be removed
        self._batches = 0  # of training, in this run
        self._unchecked: list[str] = []  # tensors that will be cut, until optimizers have state of them
        self._out_of_reach: float | None = None  # the pruning step that was left out last
        self._reads_consumers = repair is not None or narrow is not None or arguments.layers
        given = arguments.of_layers(batches, repair is not None)
        self.layers = None if given is None else LayerRemoval(given)

    @property
    def ready(self) -> bool:
        """Whether enough was gathered to score by."""
        return self.gathering.ready or self.state.fade is not None

    @property
    def fade_steps(self) -> int:  # type: ignore[override]
        """Optimizer steps before a pruning step over which units fade."""
        return self.arguments.fade_steps

    @property
    def fading(self) -> float | None:
        """The progress of the pruning step whose units fade."""
        return None if self.state.fade is None else self.state.fade.coming.progress

    @property
    def units(self) -> int:
        """How many units are removed in all, as the rehearsal found."""
        return 0 if self.state.start is None else self.state.start.units

    @property
    def start(self) -> Start:
        """The dense model."""
        assert self.state.start is not None  # set when the model is first traced, before anything is planned
        return self.state.start

    def check_schedule(self, where: str, schedule: Schedule) -> None:
        """Refuse a first pruning step before what the criterion must see, and to count filters where layers leave."""
        if self.layers is not None:
            self.layers.check_schedule(where, schedule)
        unseen = self.gathering.looks_at_training
        if unseen and schedule.progress(0) > 0:
            raise ValueError(
                f"{where}(schedule={schedule!r}): {unseen} must be seen before the first cut. Start at "
                f"{schedule.by[:-1]} 1."
            )
        if self.fade_steps and schedule.progress(0) > 0:
            raise ValueError(
                f"{where}(fade_steps={self.fade_steps}, schedule={schedule!r}): units fade before a pruning step, and "
                f"no step comes before the first one. Start at {schedule.by[:-1]} 1 or later."
            )

    def refuse(self, run: Run) -> None:
        """Refuse a run in which no unit can be removed."""
        if self.layers is not None:
            self.layers.refuse(run)
            if is_model_parallel(run.trainer):
                raise PruningError(
                    f"{run.where}(layers=True): layers and filters are tried on copies of the whole model, and no "
                    "process has that under ModelParallelStrategy. Use LayerPruning, or a run with strategy='ddp'."
                )
        refuse_removal(run.where, run.trainer, run.module)
        refuse_step(run.where, self.arguments.trace, run.module)
        if not self.gathering.reads_parts:
            unseen = f"no process sees all {self.gathering.looks_at_training} of a unit in training steps"
            refuse_tensor_parallel(
                run.where,
                run.trainer,
                unseen,
                "Score by weights, as TaylorFilterPruning(form='weights') does, or prune",
            )
        if self.fade_steps and is_model_parallel(run.trainer):
            raise PruningError(
                f"{run.where}(fade_steps={self.fade_steps}): no process has the whole weights to fade under "
                "ModelParallelStrategy. Leave fade_steps out."
            )

    def reads_batches(self, pl_module: LightningModule) -> bool:
        """Return whether consumer layers, or BatchNorm, will be run on training batches."""
        return self._reads_consumers or bool(self.arguments.recalibrate and batch_norms(pl_module))

    @property
    def reads_losses(self) -> bool:
        """Whether layers are scored by the training step's loss."""
        return self.layers is not None and self.layers.reads_losses

    def prepare(self, run: Run, batch: Any | None) -> bool:
        """Trace the model on known inputs, or on the first batch that holds any, and rehearse the whole amount."""
        check_optimizers(run.where, run.trainer.optimizers)
        if self.layers is not None and not self.layers.prepare(run, batch):
            return False
        given = [self.example_inputs, *(member.strategy.example_inputs for member in run.members)]
        inputs = run.inputs.find(run.module, self.traces, given, batch)
        if inputs is None:
            return False
        inputs = on_device_of(run.trainer, run.module, inputs)
        whole = not is_model_parallel(run.trainer)
        self.traced.alone = networks_left_alone(run, self.arguments.named, inputs if whole else None)
        if whole:
            self.traced.alone |= not_saved(run.module)
        self.traced.trace_on(inputs)
        structure = self.traced.groups(run.module)
        self.traced.count(run.module, structure)
        self._refuse_overlap(run, structure)
        if (size := tensor_parallel_size(run.trainer)) > 1:
            rank_zero_info(
                f"{run.where}: tensor parallelism splits layers over {size} processes, so each keeps a multiple of "
                f"{size} units, or stays as it is."
            )
        structure = self.traced.prunable(run.module, self.state.refused, structure)
        self.state.pinned, self.state.branching = structure.pinned, list(structure.branching)
        if self.state.start is None:
            check_prunable(run.module, structure)
            refuse_not_finite(run.where, run.module, written_with(structure))
            part = self.traced.part(run.module)
            self.state.start = Start.of(run.module, structure, self.arguments, self.traced.flops(run.module), part)
        elif run.own.asks_for_other_amounts:
            refuse_other_part(run.where, *run.own.changes.get("module", (None, None)))
            self.start.follow(run.module, structure, self.arguments)
            self.state.fade = None  # its units were selected for other amounts
            self.state.warned = False
        elif self.layers is None:
            structure = structure.without_each(self.state.regrouped(structure))
        if self.arguments.target == "latency" and self.start.shapes is None:
            raise PruningError(
                f"{run.where}(target='latency'): the checkpoint is of a run with another target and does not "
                "tell the shape that the whole model had. Go on with that target, or start anew."
            )
        if run.own.clock.unfinished:
            plan = self._rehearsed(run, structure)
            gone = (self.start.widths.get(width.name, width.before) - width.after for width in plan.widths)
            self.start.units = self.start.units or sum(gone)
            self._warn_if_short(run, plan)
            self._refuse_endless(run)
            self._rehearsal = structure, plan.cut if plan.model is run.module else None  # or a copy without layers
            if self.state.fade is None:
                self.gathering.watch(run.module, structure)
        return True

    def rehearse(self, run: Run, batch: Any) -> None:
        """Refuse a batch on which units could not be scored, or steps would not run once all is pruned."""
        rehearsal, self._rehearsal = self._rehearsal, None
        if rehearsal is None or is_model_parallel(run.trainer):
            return
        structure, cut = rehearsal
        gathered = self.gathering.gathered()
        self.gathering.rest()  # it is not to look at this
        self.gathering.rehearse(run.module, structure, batch)
        if cut is not None:
            refuse_cut_steps(run.where, run.module, batch, cut, self.traces)
            self._unchecked = list(cut.kept)
        if gathered is not None:
            self.gathering.take_up(gathered)
            self._watch_on(run.module)

    def _rehearsed(self, run: Run, structure: Structure) -> Plan:
        """Return a plan of the whole amount, by scores that cost nothing; what filters cannot reach, layers may."""
        try:
            return self._plan(run, structure, score_units(run.module, structure, "l1"), progress=1.0)
        except PruningError:
            if self.layers is None:
                raise
        twin = self.layers.without_most(run.module)
        slim = self.traced.prunable(twin, self.state.refused)
        start = self.start.without_layers(twin, slim, self.arguments)
        return self._plan(replace(run, module=twin), slim, score_units(twin, slim, "l1"), progress=1.0, start=start)

    def _refuse_endless(self, run: Run) -> None:
        """Refuse to fade before epochs whose length nobody knows."""
        if self.fade_steps and run.own.schedule.by == "epochs" and not math.isfinite(run.trainer.num_training_batches):
            raise PruningError(
                f"{run.where}(fade_steps={self.fade_steps}): the data do not tell how many batches an epoch has, so "
                "it is not known when to begin. Let the schedule count steps, by='steps'."
            )

    def start_fade(self, run: Run, coming: Coming) -> None:
        """Select the units of the next pruning step, and begin to drive them to zero."""
        if coming.progress == self._out_of_reach:
            return
        structure, scores = self._scored(run)
        try:
            plan = self._plan(run, structure, scores, coming.progress, self.gathering.adding_up)
        except OutOfReachError as error:
            self._leave_out(run, coming.progress, error)
            return
        if plan.cut.kept:
            recipe_of(run.module).needed = True  # before guards save what state dicts say
            run.before_step()  # what a guard goes back to is the model before anything faded
        self.state.fade = Fade.of(plan, coming)

    def after_batch(self, run: Run) -> None:
        """Drive the units that fade nearer to zero, if an optimizer stepped; refuse what will not do later."""
        self._batches += 1
        if self._unchecked and any(optimizer.state for optimizer in run.trainer.optimizers):
            own = dict(run.module.named_parameters())
            refuse_unfitting(run.trainer.optimizers, [own[name] for name in self._unchecked if name in own])
            self._unchecked = []
        if self._batches == _ENOUGH:
            refuse_unseen(run.where, self.gathering, run.module)
        fade = self.state.fade
        if fade is not None:
            fade.scale_(run.module, steps_until(run.trainer, run.own.schedule.by, fade.coming.moment))

    def _prunable(self, pl_module: LightningModule) -> Structure:
        """Return the groups that may be pruned, of those that the dense model had; with layers new ones can come."""
        structure = self.traced.prunable(pl_module, self.state.refused)
        return structure if self.layers is not None else structure.without_each(self.state.regrouped(structure))

    def _scored(self, run: Run) -> tuple[Structure, Scores]:
        """Return the groups that may be pruned, and their scores, the same on all processes; stop gathering."""
        structure = self._prunable(run.module)
        refuse_not_finite(run.where, run.module, written_with(structure))
        scores = self.gathering.scores(run.trainer, run.module, structure)
        if self._adjust is not None:
            scores = self._adjust(structure, scores)
        scores = run.trainer.strategy.broadcast(scores)
        self.gathering.rest()
        return structure, scores

    def _due_plan(self, run: Run, progress: float) -> Plan:
        """Return the plan of a pruning step: what has faded, or else what scores lowest now; layers leave at once."""
        if self.layers is not None:
            kept = self._without_layers(run, self.layers, progress)
            structure = self._prunable(run.module)
            return self._plan(run, structure, {}, progress, chosen=kept)
        fade, self.state.fade = self.state.fade, None
        if fade is not None:
            fade.scale_(run.module, 0)  # an epoch may end early
            structure = self._prunable(run.module)
            chosen = fade.chosen(structure)
            if chosen is not None:
                refuse_not_finite(run.where, run.module, written_with(structure))
                return self._plan(run, structure, {}, progress, chosen=chosen)
        if self.fade_steps:
            rank_zero_warn(
                f"{run.where}: a pruning step is made at once, and its units did not fade before: no step came before "
                "it, a guard held it back, or other units can be pruned than when they were selected."
            )
        structure, scores = self._scored(run)
        return self._plan(run, structure, scores, progress, self.gathering.adding_up)

    def _without_layers(self, run: Run, layers: LayerRemoval, progress: float) -> Keep:
        """Remove the layers that lose least if filters make up the rest, and return the filters that are then kept."""
        before = self.traced.prunable(run.module, self.state.refused)
        refuse_not_finite(run.where, run.module, written_with(before))
        refused = self.state.refused  # what is refused in a try is so without the layers of that try

        def plan_cut(twin: nn.Module, rest: float) -> Plan:
            assert isinstance(twin, LightningModule)
            beside = replace(run, module=twin)
            structure, scores = self._scored(beside)
            start = self.start.without_layers(twin, structure, self.arguments)
            plan = self._plan(beside, structure, scores, progress, self.gathering.adding_up, start=start)
            self.state.refused = refused
            if self._repair is not None:
                plan = self._repair.repair(beside, plan)
            return plan

        asked = share_due(self.start.amount, run.own.schedule, progress)
        assert not isinstance(asked, Mapping)  # refused when the callback was made
        amount = 1 - (1 - asked) / (1 - self.goal(run).reached)
        split = layers.remove_some(run, max(0.0, amount), plan_cut)
        if split.filters is not None:
            self.state.refused = dict(split.filters.refused)
        self.traced.changed()
        after = self.traced.prunable(run.module, self.state.refused)
        self.state.start = self.start.without_layers(run.module, after, self.arguments)
        left = named_tensors(run.module)
        for name, group in before.groups.items():
            if not any(slot.tensor in left for slot in group.slots):
                self.state.widths[name] = 0
        tried = ", ".join(f"{each.layers} ({each.lost:.4g})" for each in split.tried)  # nan: out of reach
        removed = ", ".join(layer.path for layer in split.layers.removed) or "none"
        rank_zero_info(f"{run.where}: layers removed: {removed}. Tried, with filters for the rest (lost): {tried}.")
        if split.filters is None:
            return {name: np.ones(group.width, dtype=bool) for name, group in after.groups.items()}
        return split.filters.keep

    def prune_to(self, run: Run, progress: float) -> None:
        """Remove units up to the sparsity that the schedule asks for at ``progress``."""
        try:
            plan = self._due_plan(run, progress)
        except OutOfReachError as error:  # unlike at the start, when all was rehearsed
            self._leave_out(run, progress, error)
            return
        if plan.latency_kept is not None:
            self.state.latency = plan.latency_kept
        if plan.cut.kept:
            if self._repair is not None:
                plan = self._repair.repair(run, plan)
            inexpressible = apply_plan_(run, plan)
            if inexpressible and progress >= 1.0:
                rank_zero_warn(f"{run.where}: {inexpressible}")
            self.traced.count(run.module, plan.structure, plan.keep)
            recalibrate_(run.trainer, run.module, self.arguments.recalibrate, self.traces)
        self.state.widths |= {width.name: width.after for width in plan.widths}
        self.state.pinned = plan.structure.pinned
        if progress >= 1.0:
            self._warn_if_short(run, plan, done=True)
        if progress < 1.0:
            self._watch_on(run.module)

    def after_training(self, run: Run) -> None:
        """Have configs say which layers are left."""
        if self.layers is not None:
            self.layers.after_training(run)

    def before_split(self, pl_module: LightningModule) -> None:
        """Count now: the model is whole here alone."""
        self.traced.flops(pl_module)

    def after_split(self) -> None:
        """Go on with parameters that are other objects."""
        self.gathering.after_split()

    def after_cut(self, run: Run, plan: Plan) -> None:
        """Count anew after a cut, whoever made it; what was gathered for units that are kept stays."""
        self.traced.changed()
        self._rehearsal = None
        if self.state.fade is not None:  # likewise of another callback
            self.state.fade.follow(plan.cut.kept)
        gathered = self.gathering.gathered()
        if gathered is not None:  # a cut of another callback: nothing is gathered during our own
            self.gathering.rest()
            self.gathering.take_up(of_kept_units(gathered, plan.keep))
            self._watch_on(run.module)

    def before_backward(self, loss: Tensor) -> None:
        """Show the graph of a loss to the criterion."""
        self.gathering.before_backward(loss)

    def after_backward(self, trainer: Trainer) -> None:
        """Show the gradients of one backward pass to the criterion."""
        self.gathering.after_backward(trainer)

    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show the gradients of a step to the criterion."""
        self.gathering.before_step(trainer, pl_module, optimizer)

    def after_epoch(self, run: Run) -> None:
        """Refuse to wait for what an epoch did not show."""
        refuse_blind(run.where, self.gathering, run.trainer, run.module)
        refuse_unseen(run.where, self.gathering, run.module)

    def goal(self, run: Run) -> Goal:
        """Return what was asked and what is reached now."""
        start, target = self.start, self.arguments.target
        part = start.budget.part
        now = Footprint(part.params(run.module), part.counted(self.traced.flops(run.module)))
        outcome = outcome_of(start.amount, target, start.dense, self.state.widths, now, self.state.latency, {})
        return Goal(run.where, target, outcome.asked, outcome.reached)

    def rollback_state(self) -> dict[str, Any]:
        """Return the widths, the latency and the layers."""
        own = {"widths": dict(self.state.widths), "latency": self.state.latency}
        if self.layers is None:
            return own
        return {**own, "start": self.start.to_plain(), "layers": self.layers.rollback_state()}

    def rollback(self, run: Run, state: dict[str, Any]) -> None:
        """Follow a model that is as it was before the last pruning step."""
        self.state.widths, self.state.latency = dict(state["widths"]), state["latency"]
        self.state.fade = None
        if self.layers is not None:
            self.state.start = Start.from_plain(state["start"])
            self.layers.rollback(run, state["layers"])
        self.traced.changed()
        self.gathering.rest()
        if run.own.clock.unfinished:
            self._watch_on(run.module)

    def state_dict(self) -> dict[str, Any]:
        """Return the dense model, what was removed, and what was gathered since."""
        layers = None if self.layers is None else self.layers.state_dict()
        return {**self.state.to_plain(), "gathered": self.gathering.gathered(), "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.state = RemovalState.from_plain(state)
        self.gathering.take_up(state["gathered"])
        if self.layers is not None and state["layers"] is not None:
            self.layers.load_state_dict(state["layers"])

    def before_save(self, run: Run, state: dict[str, Any]) -> None:
        """Replace what was gathered by what all processes have."""
        self.gathering.amend(run.trainer, state["gathered"])

    def reset(self) -> None:
        """Start anew, for another model."""
        self.state = RemovalState()
        if self.layers is not None:
            self.layers.reset()

    def release(self) -> None:
        """Remove every hook from the model."""
        self._batches = 0
        self.gathering.rest()

    def _refuse_overlap(self, run: Run, structure: Structure) -> None:
        own = self.arguments.claims(run.module, structure)
        for other in run.members:
            if other is not run.own and isinstance(other.strategy, UnitRemoval):
                shared = own & other.strategy.arguments.claims(run.module, structure)
                refuse_shared(run.own.callback, other.callback, shared, "the modules between them by ignore=")

    def _plan(
        self,
        run: Run,
        structure: Structure,
        scores: Scores,
        progress: float,
        adding_up: bool = False,
        chosen: Keep | None = None,
        start: Start | None = None,
    ) -> Plan:
        """Select the units to remove, unless they were chosen before, and verify the cut."""
        start, schedule = start or self.start, run.own.schedule
        asked = self.arguments  # limits are those of the dense model's layers
        budget = replace(start.budget, target=asked.target, scope=asked.scope, round_to=asked.round_to)
        budget = replace(budget, parts=tensor_parallel_size(run.trainer))
        measured = partial(latency_of_first, run.trainer, run.module, self.traced.inputs, start.shapes)
        plan = plan_filters(
            run.module, self.traced.inputs, structure, scores, share_due(start.amount, schedule, progress), budget,
            dense=replace(start.dense, left=self.state.widths), latency=measured, at_most=schedule.at_most(progress),
            adding_up=adding_up, refused=self.state.refused, chosen=chosen,
        )  # fmt: skip
        self.state.refused = dict(plan.refused)
        return plan

    def _watch_on(self, pl_module: LightningModule) -> None:
        if self.gathering.looks_at_training:
            self.gathering.watch(pl_module, self._prunable(pl_module))

    def _warn_if_short(self, run: Run, plan: Plan, done: bool = False) -> None:
        """Warn once if less is removed than was asked: at once for widths, for all else when pruning is done."""
        known = done or self.arguments.target == "filters"
        if known and plan.outcome.short and not self.state.warned:
            self.state.warned = True
            rank_zero_warn(f"{run.where}: {plan.outcome.short}")
        if plan.never_ran:
            rank_zero_warn(f"{run.where}: {plan.never_ran}")

    def _leave_out(self, run: Run, progress: float, error: OutOfReachError) -> None:
        """Leave a pruning step out, and warn once: to take all there is would ruin what is left to train."""
        self._out_of_reach = progress
        self._watch_on(run.module)
        if not self.state.warned:
            self.state.warned = True
            rank_zero_warn(
                f"{run.where}: a pruning step before epoch {run.trainer.current_epoch} is left out, and training goes "
                f"on with the model as it is, since the amount is no longer in reach. {error}"
            )
