"""Drives all pruning callbacks of a Trainer: when to prune, what to log, what checkpoints hold; knows no criterion."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.callbacks.engine.averaging import keep_metadata_when_saved_, let_copies_follow
from lightning_prune.callbacks.engine.batches import refuse_without_loss
from lightning_prune.callbacks.engine.checkpoint_state import keep_hyperparameters_
from lightning_prune.callbacks.engine.example_inputs import RunInputs, inputs_of
from lightning_prune.callbacks.engine.fade import coming_step
from lightning_prune.callbacks.engine.guard import companions, guards
from lightning_prune.callbacks.engine.processes import refuse_early_end, refuse_uneven
from lightning_prune.callbacks.engine.refusals import refuse_misfits, refuse_run, refuse_short, refuse_twins
from lightning_prune.callbacks.engine.run_log import RunLog
from lightning_prune.callbacks.engine.settings import log_settings
from lightning_prune.callbacks.engine.sharding import (
    is_model_parallel,
    load_as_before_,
    note_shapes_,
    refuse_old_torch,
    take_shapes_before_loading_,
    whole_model,
)
from lightning_prune.callbacks.engine.strategy import Member, Run
from lightning_prune.callbacks.engine.tensor_parallel import Agreement
from lightning_prune.callbacks.engine.user_averages import UserAverages
from lightning_prune.model.torch_modes import refuse_inference_tensors
from lightning_prune.surgery import drop_unused_recipe_, recipe_of, take_shapes_


class Engine:
    """The run of a Trainer, shared by all of its pruning callbacks.

    Every callback passes its hooks on, so that each acts at its own place among the Trainer's callbacks.

    Args:
        members: The pruning callbacks' parts, in the order of the callbacks.
        pl_module: The module that they prune.
        earlier: The engine of an earlier run of this module, if there was one.
    """

    def __init__(
        self,
        members: tuple[Member, ...] = (),
        pl_module: LightningModule | None = None,
        earlier: Engine | None = None,
    ) -> None:
        self.members = members
        self.log = RunLog()
        self.inputs = RunInputs()
        if earlier is not None:
            self.log.history = copy.deepcopy(earlier.log.history)
            self.inputs.example = earlier.inputs.example
        self._module = None if pl_module is None else weakref.ref(pl_module)
        self._agreement = Agreement()
        self._hooks: list[Any] = []
        self._copy_hooks: list[Any] = []  # on averaged copies of the module
        self.averages = UserAverages()

    @property
    def module(self) -> LightningModule | None:
        """The module that is pruned, while there is one."""
        return None if self._module is None else self._module()

    def is_of(self, pl_module: LightningModule) -> bool:
        """Return whether this is the engine of a run of the module."""
        return self.module is pl_module

    # The beginning and the end of a run

    def setup(self, own: Member, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and have the model take the shapes of any checkpoint that is loaded."""
        run = self._run(own, trainer, pl_module)
        if is_model_parallel(trainer):
            refuse_old_torch(run.where)
        if stage == "fit":
            refuse_twins(own.callback, [member.callback for member in self.members])
            refuse_inference_tensors(run.where, pl_module)
            own.strategy.refuse(run)
            refuse_run(run.where, own.clock.schedule, trainer)
        own.start_run(pl_module)
        recipe_of(pl_module)
        if own is self.members[0]:
            take_shapes_before_loading_(run.where, trainer, pl_module)
            keep_metadata_when_saved_(trainer.strategy)
            self.log.start_run()
            self._agreement.note_numbers(trainer, pl_module)
            if stage == "fit":
                callbacks = [*(member.callback for member in self.members), *guards(trainer)]
                log_settings(trainer, pl_module, callbacks)
            self._remove_hooks()
            self._hooks = [pl_module.register_load_state_dict_pre_hook(take_shapes_)]
            self._copy_hooks = let_copies_follow(trainer, pl_module)

    def start_training(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model, and refuse a training that ends before the schedule does."""
        run = self._run(own, trainer, pl_module)
        if trainer.ckpt_path is not None and not own.resumed:  # of a run without this callback
            if own.clock.progress > 0:
                rank_zero_warn(
                    f"{run.where}: {trainer.ckpt_path} holds no state of it, so it starts anew, and amounts are "
                    "relative to the model in that checkpoint."
                )
            own.start_anew()
        refuse_short(run.where, own.clock.schedule, trainer)
        if own is self.members[0]:
            refuse_misfits(run.where, trainer, pl_module)
            refuse_uneven(run.where, trainer)
            self.log.start_training(run)
        self._prepare(run, None)

    def end_training(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what is due after training, warn of what was left undone, and report for all callbacks."""
        run, clock = self._run(own, trainer, pl_module), own.clock
        if clock.prunes_after_training and own.prepared and clock.unfinished:
            self._prune(run, 1.0)
        for guard in guards(trainer):
            guard.judge(trainer, pl_module)
        self.log.warn_unfinished(run)
        if not own.prepared:
            return
        if self._is_last(own):
            self.log.warn_outdated(run)
            self.log.report_end(run)
        own.strategy.after_training(run)

    def end_fit(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune where there was nothing left to train: a checkpoint that has had all its epochs."""
        if own.clock.prunes_after_training and not own.prepared and trainer.fit_loop._combined_loader is not None:
            self._prepare(self._run(own, trainer, pl_module), None)
            self.end_training(own, trainer, pl_module)

    def stop(self, own: Member, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as after a run that ended well, and report what was pruned until then."""
        self.teardown(own, trainer, pl_module)
        if own.prepared and self._is_last(own):
            self.log.report_stop(self._run(own, trainer, pl_module), exception)

    def teardown(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook; a model that was cut goes on to say so in its state dicts."""
        own.strategy.release()
        load_as_before_(trainer)
        if self.members[:1] == (own,):  # the others may have none: a run can end before all are set up
            self._remove_hooks()
        drop_unused_recipe_(pl_module)

    # When to prune

    def start_epoch(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what is due before this epoch: no graph is alive, and the last checkpoint holds what was validated.

        What is due at the very start waits for the first batch, on which the module's steps are rehearsed. A resumed
        run does not wait, so that other callbacks see the model change when they would have seen it.
        """
        if own.prepared:
            run = self._run(own, trainer, pl_module)
            if own.inputs_verified or own.resumed:
                self._advance(run)
            if all(member.clock.schedule.by == "epochs" for member in self.members):
                self._log(run)
            own.strategy.after_epoch_start(run)

    def start_batch(self, own: Member, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Prune what is due before this step; catch up where the epoch's start was not seen or came too early.

        The count of steps moves after an optimizer's step alone, so nothing falls into a window of accumulation.
        """
        run, clock = self._run(own, trainer, pl_module), own.clock
        if own is self.members[0]:
            self.averages.look(trainer, pl_module, trainer.fit_loop.batch_idx)
        if not own.prepared:
            self._prepare(run, batch)
        if own.prepared:
            if not own.inputs_verified and clock.unfinished:
                with self._whole_if_needed(run, batch):
                    if own.strategy.reads_batches(pl_module):  # refuses what does not run before steps are spent
                        next(inputs_of(pl_module, [batch], own.strategy.traces))
                    if own.strategy.reads_losses:
                        refuse_without_loss(pl_module, batch)
                    own.strategy.rehearse(run, batch)
                own.inputs_verified = True
            if clock.schedule.by == "steps" or clock.epoch != trainer.current_epoch:
                self._advance(run)
            self._log(run)
            self._start_fade(run)

    def end_batch(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to go on to the next pruning step where processes part."""
        first = next((member for member in self.members if member.clock.unfinished), None)
        if first is own:  # one asks for all
            refuse_early_end(own.where, trainer)
        run = self._run(own, trainer, pl_module)
        own.strategy.after_batch(run)
        if trainer.is_last_batch:
            own.strategy.after_epoch(run)

    def _prepare(self, run: Run, batch: Any | None) -> None:
        """Find what can be pruned, and refuse a training too short for as many pruning steps as that takes."""
        own = run.own
        if own.asks_for_other_amounts:
            # amounts are relative to the dense model, so the schedule can be followed anew: nothing is pruned twice
            own.clock.progress = 0.0
        if own.strategy.needs_whole_model:
            self._agreement.refuse_local_numbers(run.where, run.trainer, run.module)
        with self._whole_if_needed(run, batch):
            own.prepared = own.strategy.prepare(run, batch)
        if own.prepared:
            self.log.warn_changes(run)
            own.asked_before = None
        if own.prepared and own.schedule is not own.clock.schedule:
            refuse_run(run.where, own.schedule, run.trainer)
            refuse_short(run.where, own.schedule, run.trainer)

    def _advance(self, run: Run) -> None:
        """Prune what is due, unless a guard still waits to see what the last pruning step did."""
        own, trainer = run.own, run.trainer
        on_probation = self._on_probation(run)
        progress = own.clock.due(own.schedule, trainer.current_epoch, trainer.global_step)
        own.due_without_scores = progress is not None and not own.strategy.ready
        if progress is not None and own.strategy.fading is not None:
            progress = min(progress, own.strategy.fading)  # what was selected is removed, and no more
        if progress is not None and own.strategy.ready:
            if on_probation:
                self.log.warn_held_back(run)
            else:
                self._prune(run, progress)
        if own.clock.epoch != trainer.current_epoch:
            own.clock.epoch = trainer.current_epoch
            self.log.changed = True

    def _start_fade(self, run: Run) -> None:
        """Have the units of the next pruning step fade, unless a guard still waits to see what the last one did."""
        own, strategy = run.own, run.own.strategy
        if not strategy.fade_steps or strategy.fading is not None or not own.clock.unfinished or not strategy.ready:
            return
        coming = coming_step(run, strategy.fade_steps)
        if coming is not None and not self._on_probation(run):
            strategy.start_fade(run, coming)

    def _on_probation(self, run: Run) -> bool:
        """Have every guard judge the last pruning step; return whether one of them still waits."""
        waiting = [guard.judge(run.trainer, run.module) for guard in guards(run.trainer)]
        return any(waiting)

    @property
    def fading(self) -> bool:
        """Whether units are being driven to zero for a pruning step to come."""
        return any(member.strategy.fading is not None for member in self.members)

    def _prune(self, run: Run, progress: float) -> None:
        self.log.start_step(run)
        with self._whole_if_needed(run):
            run.own.strategy.prune_to(run, progress)
        clock = run.own.clock
        clock.progress, clock.moment = progress, (run.trainer.current_epoch, run.trainer.global_step)
        self.log.changed = True

    def end_validation(self, own: Member, trainer: Trainer) -> None:
        """Write what this validation logged into the history."""
        if own is self.members[-1]:  # for all
            self.log.end_validation(trainer)

    def _log(self, run: Run) -> None:
        """Log what is left, once for all callbacks: values logged twice would be averaged."""
        if run.own is self.members[-1] and all(member.prepared for member in self.members):
            self.log.log(run)

    # For guards

    def rollback_states(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Return what the next pruning step changes of the callbacks' state, for :meth:`rollback`."""
        return {
            "members": [{**m.clock.state_dict(), "own": m.strategy.rollback_state()} for m in self.members],
            "companions": [companion.rollback_state() for companion in companions(trainer)],
        }

    def rollback(self, trainer: Trainer, pl_module: LightningModule, states: dict[str, list[Any]], halve: bool) -> None:
        """Follow a model that is as it was before the last pruning step; go on with half the step, or no further."""
        for companion, own in zip(companions(trainer), states["companions"], strict=True):
            companion.rollback(own)
        for member, state in zip(self.members, states["members"], strict=True):
            member.clock.rollback(state["progress"], halve)
            member.strategy.rollback(self._run(member, trainer, pl_module), state["own"])
        self.log.outdated = []  # they are of this size again
        self.log.changed = True

    # Checkpoints

    def save(self, own: Member, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Complete a checkpoint: hyperparameters, shapes of split weights, and what all processes have gathered."""
        keep_hyperparameters_(pl_module, checkpoint)
        if is_model_parallel(trainer):
            note_shapes_(pl_module, checkpoint)
        state = checkpoint["callbacks"][own.callback.state_key]
        own.strategy.before_save(self._run(own, trainer, pl_module), state)

    def load(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have averaged copies follow that were made after this callback's setup: their weights are loaded next."""
        if own is self.members[0]:
            for hook in self._copy_hooks:
                hook.remove()
            self._copy_hooks = let_copies_follow(trainer, pl_module)

    @contextmanager
    def _whole_if_needed(self, run: Run, batch: Any | None = None) -> Iterator[None]:
        """Show the body a plain model, where it is split and the strategy must look at all of it."""
        if not run.own.strategy.needs_whole_model:
            yield
            return
        with self.whole(run.where, run.trainer, run.module, batch):
            yield

    @contextmanager
    def whole(
        self, where: str, trainer: Trainer, pl_module: LightningModule, batch: Any | None = None
    ) -> Iterator[None]:
        """Show the body a plain model, where it is split; all callbacks find its parameters anew afterwards.

        Where tensor parallelism has split it, its outputs are compared with those of the whole model.
        """
        if not is_model_parallel(trainer):
            yield
            return
        try:
            with whole_model(where, trainer, pl_module):
                self._agreement.look(where, trainer, pl_module, batch)
                yield
                expected = self._agreement.outputs(pl_module)
                for member in self.members:
                    if member.prepared:
                        member.strategy.before_split(pl_module)
        finally:
            for member in self.members:
                member.strategy.after_split()
        self._agreement.refuse_others(where, pl_module, expected)

    def _run(self, own: Member, trainer: Trainer, pl_module: LightningModule) -> Run:
        return Run(trainer, pl_module, self.members, own, self.inputs, self.averages)

    def _is_last(self, own: Member) -> bool:
        """Return whether a callback is the last that could prepare: it reports for all."""
        return [member for member in self.members if member.prepared][-1:] == [own]

    def _remove_hooks(self) -> None:
        for hook in (*self._hooks, *self._copy_hooks):
            hook.remove()
        self._hooks, self._copy_hooks = [], []

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model and the other callbacks, which another run brings."""
        return {
            **self.__dict__,
            "members": (),
            "_module": None,
            "_agreement": Agreement(),
            "_hooks": [],
            "_copy_hooks": [],
        }
