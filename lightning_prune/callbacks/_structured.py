"""What the callbacks share that remove units from a model: scores to plan, proof and cut, and what it cost."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.arguments import (
    amount_by_group,
    check_arguments,
    check_optimizers,
    check_prunable,
    with_ignored,
)
from lightning_prune.budget import Budget, Scope, Scores, Target
from lightning_prune.callbacks._guard import guards
from lightning_prune.callbacks._inputs import batch_as_inputs, on_device_of
from lightning_prune.callbacks._pruning import Pruning
from lightning_prune.callbacks._refusals import refuse_overlap, refuse_removal, structured_callbacks
from lightning_prune.callbacks._state import Start, State
from lightning_prune.flops import FlopCount, count_flops
from lightning_prune.inputs import ExampleInputs
from lightning_prune.pruning import Prepared, count_params, prepare
from lightning_prune.reports import layer_costs, layer_table
from lightning_prune.schedules import Schedule
from lightning_prune.scoring import score_units
from lightning_prune.structure import Structure, find_structure, trace
from lightning_prune.surgery import cut_, recipe_of

__all__ = ["StructuredPruning"]


class StructuredPruning(Pruning):
    """Base of the callbacks that remove filters and neurons while a model trains; each adds its scores."""

    gathers = False
    """Whether the scores need something gathered between cuts."""

    def __init__(
        self,
        amount: float | dict[str, float],
        target: Target,
        scope: Scope,
        schedule: Schedule | None,
        ignore: Sequence[str],
        round_to: int,
        example_inputs: Any,
    ) -> None:
        """Check the arguments and keep them."""
        where = type(self).__name__
        check_arguments(where, amount, "l1", target, scope, round_to)
        if isinstance(ignore, str):
            raise TypeError(f"{where}(ignore={ignore!r}): pass a list of patterns, [{ignore!r}].")
        super().__init__(schedule)
        self.amount = amount
        self.target: Target = target
        self.scope: Scope = scope
        self.ignore = list(ignore)
        self.round_to = round_to
        self.example_inputs = example_inputs
        self._state = State()

    @abstractmethod
    def scores(self, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return one score per unit of every group, ``(width,)``; higher is kept longer."""

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Start to gather what the scores need, for the model as it stands."""

    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""

    @property
    def state_key(self) -> str:
        """Tell two callbacks of one class apart by the modules they are about."""
        named = sorted(self.amount) if isinstance(self.amount, Mapping) else []
        return self._generate_state_key(amount=named, ignore=self.ignore)

    def refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run in which no unit can leave."""
        refuse_removal(type(self).__name__, trainer, pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any | None) -> bool:
        """Trace the model on known inputs, or on the first batch, and rehearse the whole amount."""
        check_optimizers(type(self).__name__, trainer.optimizers)
        if batch is not None:
            self._state.example = batch_as_inputs(pl_module, batch)
        given = [callback.example_inputs for callback in (self, *structured_callbacks(trainer))]
        known = [*given, pl_module.example_input_array, self._state.example]
        inputs = next((inputs for inputs in known if inputs is not None), None)
        if inputs is None:
            return False
        state = self._state
        state.inputs, state.flops = on_device_of(trainer, pl_module, inputs), None
        structure = find_structure(trace(pl_module, state.inputs))
        refuse_overlap(self, trainer, pl_module, structure)
        structure = self._prunable(pl_module, structure)
        if state.start is None:
            check_prunable(pl_module, structure)
            state.start = Start(
                {name: group.width for name, group in structure.groups.items()},
                count_params(pl_module),
                self._count_flops(pl_module).total,
                layer_costs(pl_module, self._count_flops(pl_module)),
                amount_by_group(structure, self.amount),
            )
        if self._course.progress < self._course.ceiling:
            self._prepare(pl_module, structure, score_units(pl_module, structure, "l1"), progress=1.0)
            self.watch(pl_module, structure)
        return True

    def reach(self, trainer: Trainer, pl_module: LightningModule, progress: float) -> None:
        """Cut until what is due is gone."""
        structure = self._prunable(pl_module, find_structure(trace(pl_module, self._inputs)))
        scores = trainer.strategy.broadcast(self.scores(pl_module, structure))
        self.rest()
        prepared = self._prepare(pl_module, structure, scores, progress)
        if prepared.cut.kept:
            self._cut(trainer, pl_module, prepared)
        self._state.widths |= {width.name: width.after for width in prepared.widths}
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
        return {name: float(value) for name, value in values.items()}

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what became of every layer."""
        if self._speaks(trainer):
            start, flops = self._start, self._count_flops(pl_module)
            kept = count_params(pl_module) / max(start.params, 1), flops.total / max(start.flops, 1)
            title = f"Left: {kept[0]:.1%} of params, {kept[1]:.1%} of FLOPs"
            Console().print(layer_table(start.layers, layer_costs(pl_module, flops), title))

    def remembered(self) -> dict[str, Any]:
        """Return what amounts are fractions of and what has gone."""
        return self._state.remembered()

    def take_up(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self._state.take_up(remembered)

    def forget(self) -> None:
        """Start anew: the module is another one."""
        self._state = State()

    def undoable(self) -> dict[str, Any]:
        """Return the widths."""
        return {"widths": dict(self._state.widths)}

    def undo(self, pl_module: LightningModule, undoable: dict[str, Any]) -> None:
        """Follow a model that was given back what the last cut took."""
        self._state.widths, self._state.flops = dict(undoable["widths"]), None
        self.rest()
        if self._course.progress < self._course.ceiling:
            self._watch_on(pl_module)

    def detach(self, pl_module: LightningModule) -> None:
        """Take every hook off the model."""
        self.rest()

    def _speaks(self, trainer: Trainer) -> bool:
        """Tell whether this callback logs and reports for all that remove units."""
        return structured_callbacks(trainer)[-1] is self

    def _watch_on(self, pl_module: LightningModule) -> None:
        if self.gathers:
            self.watch(pl_module, self._prunable(pl_module, find_structure(trace(pl_module, self._inputs))))

    def _prunable(self, pl_module: LightningModule, structure: Structure) -> Structure:
        recipe_of(pl_module).note((a.module, a.name) for a in structure.ledger.attributes)
        structure = with_ignored(pl_module, structure, self.ignore)
        refused = [name for name in self._state.refused if name in structure.groups]
        return structure.without(refused, "an earlier cut of them could not be proved")

    def _prepare(self, pl_module: LightningModule, structure: Structure, scores: Scores, progress: float) -> Prepared:
        """Plan and prove a cut."""
        state, amount = self._state, self._start.amount
        due = (
            {name: self.schedule.sparsity(progress, a) for name, a in amount.items()}
            if isinstance(amount, Mapping)
            else self.schedule.sparsity(progress, amount)
        )
        prepared = prepare(
            pl_module,
            self._inputs,
            structure,
            scores,
            due,
            Budget(self.target, self.scope, self.round_to),
            dense=self._start.dense.without(state.refused),
            flops=self._count_flops(pl_module).total,
        )
        state.refused += prepared.refused
        return prepared

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
        if averaged:
            strategy.configure_ddp()  # type: ignore[attr-defined]
        for callback in structured_callbacks(trainer):
            callback._state.flops = None

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
            self._state.flops = count_flops(pl_module, self._inputs)
        return self._state.flops
