"""What the callbacks share that remove units from a model: scores to plan, proof and cut, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.averaging import cut_copies_
from lightning_prune.callbacks.engine.example_inputs import batch_as_inputs, on_device_of
from lightning_prune.callbacks.engine.gathering import Gathering
from lightning_prune.callbacks.engine.probation import guards
from lightning_prune.callbacks.engine.processes import latency_of_first, recalibrate_, refuse_apart
from lightning_prune.callbacks.engine.refusals import (
    refuse_blind,
    refuse_not_finite,
    refuse_overlap,
    refuse_removal,
)
from lightning_prune.callbacks.engine.run import Pruning, pruning_callbacks
from lightning_prune.callbacks.engine.state import Start, State
from lightning_prune.callbacks.engine.step import Traced, check_traced, instead_of_forward, refuse_step
from lightning_prune.measure.flops import FlopCount
from lightning_prune.measure.footprint import Footprint, count
from lightning_prune.measure.latency import circumstances, shapes_of
from lightning_prune.model.batch_norm import batch_norms
from lightning_prune.model.calls import ExampleInputs, hold_nothing
from lightning_prune.model.errors import PruningError
from lightning_prune.pruning.arguments import (
    MaxAmount,
    MinWidth,
    amount_by_group,
    budget_by_group,
    check_arguments,
    check_optimizers,
    check_prunable,
    with_ignored,
)
from lightning_prune.pruning.budget import Budget, Scope, Scores, Target
from lightning_prune.pruning.filters import Prepared, count_params, prepare
from lightning_prune.pruning.outcome import kept_whole_by, outcome_of, reasons_of
from lightning_prune.pruning.scoring import score_units
from lightning_prune.reports import History, LayerChange, layer_costs
from lightning_prune.structure import Keep, Structure
from lightning_prune.surgery import Kept, cut_, find_groups, recipe_of

__all__ = ["StructuredPruning", "structured_callbacks"]


class StructuredPruning(Pruning):
    """Base of the callbacks that remove filters and neurons while a model trains; each brings what it scores by."""

    def __init__(
        self,
        amount: float | dict[str, float],
        target: Target,
        scope: Scope,
        schedule: Schedule | None,
        ignore: Sequence[str],
        round_to: int,
        example_inputs: Any,
        min_width: MinWidth,
        max_amount: MaxAmount,
        recalibrate: int,
        traced: Traced,
        gathering: Gathering,
    ) -> None:
        """Check the arguments and keep them."""
        where = type(self).__name__
        check_arguments(where, amount, "l1", target, scope, round_to, min_width, max_amount)
        check_traced(where, traced, example_inputs)
        if isinstance(ignore, str):
            raise TypeError(f"{where}(ignore={ignore!r}): pass a list of patterns, [{ignore!r}].")
        if isinstance(recalibrate, bool) or not isinstance(recalibrate, int) or recalibrate < 0:
            raise ValueError(f"{where}(recalibrate={recalibrate!r}): it is a number of training batches, from 0.")
        super().__init__(schedule)
        if gathering.looks_at_training and self.schedule.progress(0) > 0:
            raise ValueError(
                f"{where}(schedule={self.schedule!r}): {gathering.looks_at_training} must be seen before the first "
                f"cut. Start at {self.schedule.by[:-1]} 1."
            )
        self.amount = amount
        self.target: Target = target
        self.scope: Scope = scope
        self.ignore = list(ignore)
        self.round_to = round_to
        self.example_inputs = example_inputs
        self.min_width = min_width
        self.max_amount = max_amount
        self.recalibrate = recalibrate
        self.trace: Traced = traced
        self._state = State()
        self._gathering = gathering

    def scores(self, trainer: Trainer, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return one score per unit of every group, ``(width,)``; higher is kept longer."""
        return self._gathering.scores(trainer, pl_module, structure)

    def mended(
        self, trainer: Trainer, pl_module: LightningModule, structure: Structure, prepared: Prepared
    ) -> Prepared:
        """Return a proved cut, its slim tensors changed by what else shall happen at it; by default nothing."""
        return prepared

    @property
    def ready(self) -> bool:
        """Whether enough was gathered to score by."""
        return self._gathering.ready

    @property
    def units(self) -> int:
        """How many units leave in all, as the rehearsal found."""
        return 0 if self._state.start is None else self._state.start.units

    @property
    def about(self) -> str:
        """Name the class and the modules that this callback is about."""
        named = sorted(self.amount) if isinstance(self.amount, Mapping) else []
        return self._generate_state_key(amount=named, ignore=self.ignore)

    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run in which no unit can leave."""
        refuse_removal(type(self).__name__, trainer, pl_module)
        refuse_step(type(self).__name__, self.trace, pl_module)

    def will_run_on_batches(self, pl_module: LightningModule) -> bool:
        """Tell whether BatchNorm's statistics will be averaged anew after a cut."""
        return bool(self.recalibrate and batch_norms(pl_module))

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Trace the model on known inputs, or on the first batch that holds any, and rehearse the whole amount."""
        check_optimizers(type(self).__name__, trainer.optimizers)
        inputs = self._found_inputs(trainer, pl_module, batch)
        if inputs is None:
            return False
        state = self._state
        state.inputs = on_device_of(trainer, pl_module, inputs)
        structure = find_groups(pl_module, state.inputs)
        refuse_overlap(self, structured_callbacks(trainer), pl_module, structure)
        structure = self._prunable(pl_module, structure)
        state.pinned, state.branching = structure.pinned, list(structure.branching)
        state.flops = count(pl_module, state.inputs, structure)
        if state.start is None:
            check_prunable(pl_module, structure)
            self._refuse_not_finite(pl_module, structure)
            state.start = Start(
                {name: group.width for name, group in structure.groups.items()},
                count_params(pl_module),
                self._count_flops(pl_module).total,
                layer_costs(pl_module, self._count_flops(pl_module)),
                amount_by_group(structure, self.amount),
                self._budget_of(structure),
                shapes_of(pl_module, structure) if self.target == "latency" else None,
            )
        if self.target == "latency" and state.start.shapes is None:
            raise PruningError(
                f"{type(self).__name__}(target='latency'): the checkpoint is of a run with another target and does not "
                "tell the shape that the whole model had. Go on with that target, or start anew."
            )
        if self._course.progress < self._course.ceiling:
            scores = score_units(pl_module, structure, "l1")
            prepared = self._prepare(trainer, pl_module, structure, scores, progress=1.0)
            state.start.units = state.start.units or sum(width.before - width.after for width in prepared.widths)
            self._warn_if_short(pl_module, prepared)
            self._gathering.watch(pl_module, structure)
        return True

    def reach(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Cut until what is due is gone."""
        structure = self._prunable(pl_module, find_groups(pl_module, self._inputs))
        self._refuse_not_finite(pl_module, structure)
        scores = trainer.strategy.broadcast(self.scores(trainer, pl_module, structure))
        self._gathering.rest()
        prepared = self._prepare(trainer, pl_module, structure, scores, progress, self._gathering.adding_up)
        if prepared.cut.kept:
            if self.target == "latency":  # measured before the cut, which nothing that fails may follow
                self._state.latency = self._latency(trainer, pl_module, prepared.structure, prepared.keep)
            self._cut(trainer, pl_module, self.mended(trainer, pl_module, structure, prepared))
            self._state.flops = count(pl_module, self._inputs, prepared.structure, prepared.keep)
            recalibrate_(trainer, pl_module, self.recalibrate)
        self._state.widths |= {width.name: width.after for width in prepared.widths}
        self._state.pinned = prepared.structure.pinned
        if progress >= 1.0:
            self._warn_if_short(pl_module, prepared, done=True)
        if progress < self._course.ceiling:
            self._watch_on(pl_module)

    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return parameters, multiply-adds, and the share of filters that could leave and have left."""
        if not self._speaks(trainer):
            return {}
        start, flops, params = self._start, self._count_flops(pl_module).total, count_params(pl_module)
        dense: dict[str, int] = {}
        left: dict[str, int] = {}
        for state in (callback._state for callback in structured_callbacks(trainer)):
            for name, width in (state.start.widths if state.start is not None else {}).items():
                dense[name] = max(dense.get(name, 0), width)
                left[name] = min(left.get(name, width), state.widths.get(name, width))
        values = {
            "prune/params": params,
            "prune/flops": flops,
            "prune/params_kept": params / max(start.params, 1),
            "prune/flops_kept": flops / max(start.flops, 1),
            "prune/sparsity": 1 - sum(left.values()) / max(sum(dense.values()), 1),
        }
        for state in (callback._state for callback in structured_callbacks(trainer)):
            if state.start is not None and state.start.shapes is not None:
                values["prune/latency_kept"] = state.latency
        return {name: float(value) for name, value in values.items()}

    def describe(self, trainer: Trainer, pl_module: LightningModule, history: History) -> None:
        """Tell every layer's cost, before and now, and what stays."""
        if self._speaks(trainer):
            now = layer_costs(pl_module, self._count_flops(pl_module))
            history.layers = {path: LayerChange(was, now.get(path, was)) for path, was in self._start.layers.items()}
            history.measured = circumstances(pl_module, self._inputs)
            history.counted = self._count_flops(pl_module).counted
            history.pinned, history.branching = list(self._state.pinned), list(self._state.branching)

    def remembered(self) -> dict[str, Any]:
        """Return what amounts are fractions of, what has gone, and what was gathered since."""
        return {**self._state.remembered(), "gathered": self._gathering.gathered()}

    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self._state.take_up(remembered)
        self._gathering.take_up(remembered["gathered"])

    def amend(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Let what was gathered be what all processes have."""
        self._gathering.amend(trainer, checkpoint["callbacks"][self.state_key]["gathered"])

    def forget(self) -> None:
        """Start anew: the module is another one."""
        self._state = State()

    def undoable(self) -> dict[str, Any]:
        """Return the widths and the latency."""
        return {"widths": dict(self._state.widths), "latency": self._state.latency}

    def undo(self, pl_module: LightningModule, undoable: dict[str, Any]) -> None:
        """Follow a model that was given back what the last cut took."""
        self._state.widths, self._state.flops = dict(undoable["widths"]), None
        self._state.latency = undoable["latency"]
        self._gathering.rest()
        if self._course.progress < self._course.ceiling:
            self._watch_on(pl_module)

    def follow(self, kept: Kept) -> None:
        """Count anew after a cut, whoever made it."""
        self._state.flops = None

    def detach(self, pl_module: LightningModule) -> None:
        """Take every hook off the model."""
        self._gathering.rest()

    # What the run shows to the criterion

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due, and look at what follows alone."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._gathering.before_batch()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Gather from the forward passes of one training step."""
        super().on_train_batch_end(trainer, pl_module)
        self._gathering.after_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Forget what backward passes outside the training step have left."""
        self._gathering.before_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather from one backward pass."""
        self._gathering.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather from the gradients that a step is made of."""
        self._gathering.before_step(trainer, pl_module, optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to wait for what an epoch did not show."""
        refuse_blind(type(self).__name__, self._gathering, trainer, pl_module)

    def _speaks(self, trainer: Trainer) -> bool:
        """Tell whether this callback logs and reports for all that remove units."""
        return structured_callbacks(trainer)[-1] is self

    def _found_inputs(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> ExampleInputs | None:
        """Return what the model is to be run on, if that is known yet."""
        state = self._state
        batch = None if batch is not None and hold_nothing(batch) else batch
        if self.trace != "forward":  # a whole batch is too much for a checkpoint: a resumed run takes its own first one
            return None if batch is None else instead_of_forward(self.trace, batch)
        if batch is not None:
            state.example = batch_as_inputs(pl_module, batch)
        given = [callback.example_inputs for callback in (self, *structured_callbacks(trainer))]
        known = [*given, pl_module.example_input_array, state.example]
        return next((inputs for inputs in known if inputs is not None), None)

    def _watch_on(self, pl_module: LightningModule) -> None:
        if self._gathering.looks_at_training:
            structure = self._prunable(pl_module, find_groups(pl_module, self._inputs))
            self._gathering.watch(pl_module, structure)

    def _prunable(self, pl_module: LightningModule, structure: Structure) -> Structure:
        recipe_of(pl_module).note((a.module, a.name) for a in structure.ledger.attributes)
        structure = with_ignored(pl_module, structure, self.ignore)
        return structure.without_each({n: why for n, why in self._state.refused.items() if n in structure.groups})

    def _refuse_not_finite(self, pl_module: LightningModule, structure: Structure) -> None:
        written = (slot.tensor for group in structure.groups.values() for slot in group.slots)
        refuse_not_finite(type(self).__name__, pl_module, written)

    def _budget_of(self, structure: Structure) -> Budget:
        budget = Budget(self.target, self.scope, self.round_to, self.min_width, self.max_amount)
        return budget_by_group(structure, budget)

    def _prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        structure: Structure,
        scores: Scores,
        progress: float,
        adding_up: bool = False,
    ) -> Prepared:
        """Plan and prove a cut."""
        state, amount, schedule = self._state, self._start.amount, self.cuts
        due = (
            {name: schedule.sparsity(progress, a) for name, a in amount.items()}
            if isinstance(amount, Mapping)
            else schedule.sparsity(progress, amount)
        )
        prepared = prepare(
            pl_module,
            self._inputs,
            structure,
            scores,
            due,
            self._budget,
            dense=self._start.dense.without(state.refused),
            latency=partial(self._latency, trainer, pl_module),
            at_most=schedule.at_most(progress),
            adding_up=adding_up,
        )
        state.refused |= reasons_of(structure, prepared.structure)
        return prepared

    def _warn_if_short(self, pl_module: LightningModule, prepared: Prepared, done: bool = False) -> None:
        """Warn once if less leaves than was asked: as soon as that is known of widths, of all else when it is done."""
        state, start, budget = self._state, self._start, self._budget
        if state.warned or not (done or self.target == "filters"):
            return
        widths = {**start.widths, **state.widths, **{width.name: width.after for width in prepared.widths}}
        now = Footprint(count_params(pl_module), self._count_flops(pl_module).total) if done else start.dense.footprint
        free = start.dense.without(name for name in start.widths if name not in prepared.structure.groups)
        why = {**kept_whole_by(prepared.structure, budget, free, widths), **state.refused}
        outcome = outcome_of(start.amount, self.target, start.dense, widths, now, state.latency, why)
        if outcome.short:
            state.warned = True
            rank_zero_warn(f"{type(self).__name__}: {outcome.short}")

    def _latency(self, trainer: Trainer, pl_module: LightningModule, structure: Structure, keep: Keep) -> float:
        return latency_of_first(trainer, pl_module, self._inputs, self._start.shapes, structure, keep)

    def _cut(self, trainer: Trainer, pl_module: LightningModule, prepared: Prepared) -> None:
        """Make a cut; where processes average gradients, what averages them is made anew for the new shapes."""
        strategy = trainer.strategy
        averaged = isinstance(strategy.model, DistributedDataParallel)
        if averaged:
            strategy.model = pl_module
        recipe_of(pl_module).needed = True
        for guard in guards(trainer):
            guard.before_cut(trainer, pl_module)
        cut_(pl_module, prepared.cut, prepared.tensors, trainer.optimizers)
        cut_copies_(trainer, pl_module, prepared.cut)
        if averaged:
            refuse_apart(type(self).__name__, trainer, pl_module)  # to wrap anew sends the first one's weights to all
            strategy.configure_ddp()  # type: ignore[attr-defined]
        for callback in pruning_callbacks(trainer):
            callback.follow(prepared.cut.kept)

    @property
    def _budget(self) -> Budget:
        return replace(self._start.budget, target=self.target, scope=self.scope, round_to=self.round_to)

    @property
    def _start(self) -> Start:
        assert self._state.start is not None  # set when the model is first traced, before anything is planned
        return self._state.start

    @property
    def _inputs(self) -> ExampleInputs:
        assert self._state.inputs is not None
        return self._state.inputs

    def _count_flops(self, pl_module: LightningModule) -> FlopCount:
        if self._state.flops is None:
            self._state.flops = count(pl_module, self._inputs)
        return self._state.flops


def structured_callbacks(trainer: Trainer) -> list[StructuredPruning]:
    """Return the trainer's callbacks that cut."""
    return [callback for callback in pruning_callbacks(trainer) if isinstance(callback, StructuredPruning)]
