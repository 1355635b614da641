"""The life of a run in which units leave: when a cut is due, what is logged, what a checkpoint remembers."""

from __future__ import annotations

import inspect
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
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
from lightning_prune.callbacks._refusals import leads, pruning_callbacks, refuse_overlap, refuse_run, refuse_short
from lightning_prune.callbacks._state import Start, State
from lightning_prune.flops import FlopCount, count_flops
from lightning_prune.inputs import ExampleInputs
from lightning_prune.pruning import Prepared, count_params, prepare
from lightning_prune.reports import layer_costs, layer_table
from lightning_prune.schedules import OneShot, Schedule
from lightning_prune.scoring import score_units
from lightning_prune.structure import Structure, find_structure, trace
from lightning_prune.surgery import cut_, drop_unused_recipe_, recipe_of, take_shapes_

__all__ = ["StructuredPruning"]


class StructuredPruning(Callback):
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
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"{where}(schedule={schedule!r}): pass OneShot, Linear, Cubic or another Schedule.")
        self.amount = amount
        self.target: Target = target
        self.scope: Scope = scope
        self.schedule: Schedule = schedule if schedule is not None else OneShot()
        self.ignore = list(ignore)
        self.round_to = round_to
        self.example_inputs = example_inputs
        self._state = State()
        self._module: weakref.ref[LightningModule] | None = None
        self._hooks: list[Any] = []

    @abstractmethod
    def scores(self, pl_module: LightningModule, structure: Structure) -> Scores:
        """Return one score per unit of every group, ``(width,)``; higher is kept longer."""

    def watch(self, pl_module: LightningModule, structure: Structure) -> None:
        """Start to gather what the scores need, for the model as it stands."""

    @property
    def ready(self) -> bool:
        """Whether enough was gathered to score by."""
        return True

    def rest(self) -> None:
        """Stop gathering, and take every hook off the model."""

    @property
    def state_key(self) -> str:
        """Tell two callbacks of one class apart by the modules they are about."""
        named = sorted(self.amount) if isinstance(self.amount, Mapping) else []
        return self._generate_state_key(amount=named, ignore=self.ignore)

    def __repr__(self) -> str:
        """Return the call that makes this callback."""
        given = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # When

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and let the model take the shapes of any checkpoint that is loaded."""
        if stage == "fit":
            refuse_run(type(self).__name__, self.schedule, trainer, pl_module)
        if self._module is None or self._module() is not pl_module:
            self._state = State()
            self._module = weakref.ref(pl_module)
        self._state.inputs, self._state.logged_epoch = None, -1
        self._detach()
        self._hooks = [pl_module.register_load_state_dict_pre_hook(take_shapes_)]
        recipe_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers whose state cannot follow and, where inputs are known, amounts that cannot be reached."""
        check_optimizers(type(self).__name__, trainer.optimizers)
        refuse_short(type(self).__name__, self.schedule, trainer)
        given = [callback.example_inputs for callback in (self, *pruning_callbacks(trainer))]
        known = [
            inputs for inputs in (*given, pl_module.example_input_array, self._state.example) if inputs is not None
        ]
        if known:
            self._begin(trainer, pl_module, known[0])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut what is due before this epoch: no graph is alive, and the last checkpoint holds what was validated."""
        if self._state.inputs is not None:
            self._reach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Catch up where the epoch's start was not seen or came too early: at the first batch, or after a resume."""
        if self._state.inputs is None:
            self._state.example = batch_as_inputs(pl_module, batch)
            self._begin(trainer, pl_module, self._state.example)
        if self._state.logged_epoch != trainer.current_epoch:
            self._reach(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what became of every layer."""
        for guard in guards(trainer):
            guard.judge(trainer, pl_module)
        start, share = self._state.start, self._state.share
        if share < self._state.ceiling and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__}: training ended before {self.schedule} did; "
                f"{share:.0%} of amount={self.amount} was due and has left."
            )
        if start is not None and self._state.inputs is not None and trainer.is_global_zero and leads(self, trainer):
            flops = self._count_flops(pl_module)
            kept = count_params(pl_module) / max(start.params, 1), flops.total / max(start.flops, 1)
            title = f"Left: {kept[0]:.1%} of params, {kept[1]:.1%} of FLOPs"
            Console().print(layer_table(start.layers, layer_costs(pl_module, flops), title))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing on the model; one that was cut goes on to say so in its state dicts."""
        self._detach()
        drop_unused_recipe_(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave as after a run that ended well: Lightning tears down nothing here."""
        self._detach()
        drop_unused_recipe_(pl_module)

    # What

    def _begin(self, trainer: Trainer, pl_module: LightningModule, inputs: ExampleInputs) -> None:
        """Trace the model, and rehearse the whole amount before epochs are spent on it."""
        state = self._state
        state.inputs = on_device_of(trainer, pl_module, inputs)
        structure = find_structure(trace(pl_module, state.inputs))
        state.flops = None
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
        if state.share < state.ceiling:
            self._prepare(trainer, pl_module, structure, score_units(pl_module, structure, "l1"), share=1.0)
            self.watch(pl_module, structure)

    def _reach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut until the share that is due is gone, and log what is left."""
        on_probation = [guard.judge(trainer, pl_module) for guard in guards(trainer)]
        state = self._state
        share = min(self.schedule(trainer.current_epoch), state.ceiling)
        if share > state.share and self.ready and not any(on_probation):
            structure = self._prunable(pl_module, find_structure(trace(pl_module, self._inputs)))
            scores = trainer.strategy.broadcast(self.scores(pl_module, structure))
            self.rest()
            prepared = self._prepare(trainer, pl_module, structure, scores, share)
            if prepared.cut.kept:
                self._cut(trainer, pl_module, prepared)
            state.widths |= {width.name: width.after for width in prepared.widths}
            state.share = share
            self._watch_on(pl_module)
        state.logged_epoch = trainer.current_epoch
        if leads(self, trainer):
            self._log(trainer, pl_module)

    def progress(self) -> dict[str, Any]:
        """Return how far pruning has come, for :meth:`go_back`."""
        return {"share": self._state.share, "widths": dict(self._state.widths)}

    def go_back(self, pl_module: LightningModule, progress: dict[str, Any], halve: bool) -> None:
        """Follow a model that was given back what the last cut took; go on with half the step, or no further."""
        state = self._state
        step = state.share - progress["share"]
        state.share, state.widths, state.flops = progress["share"], dict(progress["widths"]), None
        if step > 0:
            state.ceiling = state.share + (step / 2 if halve and step / 2 >= 0.01 else 0.0)
        self.rest()
        self._watch_on(pl_module)

    def _watch_on(self, pl_module: LightningModule) -> None:
        if self.gathers and self._state.share < self._state.ceiling:
            self.watch(pl_module, self._prunable(pl_module, find_structure(trace(pl_module, self._inputs))))

    def _prunable(self, pl_module: LightningModule, structure: Structure) -> Structure:
        recipe_of(pl_module).note((a.module, a.name) for a in structure.ledger.attributes)
        structure = with_ignored(pl_module, structure, self.ignore)
        refused = [name for name in self._state.refused if name in structure.groups]
        return structure.without(refused, "an earlier cut of them could not be proved")

    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, structure: Structure, scores: Scores, share: float
    ) -> Prepared:
        """Plan and prove a cut."""
        state, start = self._state, self._start
        amount = start.amount
        prepared = prepare(
            pl_module,
            self._inputs,
            structure,
            scores,
            {name: share * a for name, a in amount.items()} if isinstance(amount, Mapping) else share * amount,
            Budget(self.target, self.scope, self.round_to),
            dense=start.dense.without(state.refused),
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
        for callback in pruning_callbacks(trainer):
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

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start, flops, params = self._start, self._count_flops(pl_module).total, count_params(pl_module)
        dense: dict[str, int] = {}
        left: dict[str, int] = {}
        for state in (callback._state for callback in pruning_callbacks(trainer)):
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
        pl_module.log_dict({name: float(v) for name, v in values.items()}, on_step=False, on_epoch=True, batch_size=1)

    # What a checkpoint remembers

    def state_dict(self) -> dict[str, Any]:
        """Return what amounts are fractions of and how much of them has gone, as plain numbers and tensors."""
        return self._state.remembered()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint remembers."""
        self._state.take_up(state_dict)

    def _detach(self) -> None:
        self.rest()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model, to which the trainer's ``log`` and ``log_dict`` lead too."""
        own = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        return {**own, "_module": None, "_hooks": []}
