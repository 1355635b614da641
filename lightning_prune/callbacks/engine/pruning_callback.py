"""The base of the callbacks that prune: passes the Trainer's hooks on to the engine of the run; decides nothing."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.checkpoint_state import adopt_, restore_, state_to_save
from lightning_prune.callbacks.engine.clock import Clock
from lightning_prune.callbacks.engine.engine import Engine
from lightning_prune.callbacks.engine.packages import AnyCallback
from lightning_prune.callbacks.engine.strategy import Member, Strategy
from lightning_prune.reports import History

__all__ = ["PruningCallback", "engine_of", "pruned_so_far", "pruning_callbacks", "pruning_finished"]


class PruningCallback(AnyCallback, ABC):
    """Base of the callbacks that prune: arguments, and a strategy that the engine of a run calls.

    Args:
        schedule: When to prune, and how far.
        strategy: What to do. Each of its arguments becomes an attribute of the callback.

    Attributes:
        member: This callback's part in a run.
        engine: The engine of the run, which all pruning callbacks of a Trainer share.
    """

    @abstractmethod
    def __init__(self, schedule: Schedule, strategy: Strategy) -> None:
        where, arguments = type(self).__name__, strategy.arguments
        arguments.check(where)
        if not isinstance(arguments.report, bool):
            raise TypeError(f"{where}(report={arguments.report!r}): pass True or False.")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"{where}(schedule={schedule!r}): pass OneShot, Linear, Cubic or another Schedule.")
        strategy.check_schedule(where, schedule)
        vars(self).update({each.name: getattr(arguments, each.name) for each in fields(arguments)})
        self.schedule = schedule
        self.member = Member(self, strategy, Clock(schedule))
        self.engine = Engine()

    @property
    def history(self) -> History:
        """What became of the model so far, by all pruning callbacks of the Trainer."""
        return self.engine.log.history

    @property
    def state_key(self) -> str:
        """A key of the state in checkpoints that tells callbacks of one class apart by the parts that they prune."""
        key = self._generate_state_key(**self.member.strategy.arguments.parts(self.engine.module))
        # A Trainer refuses equal keys when it is made, and does not say what to do; setup does.
        return key if self.engine.members else f"{key} {id(self)}"

    def __repr__(self) -> str:
        """Return the call that makes this callback."""
        given = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the trainer's ``log`` and ``log_dict``, which lead to the model."""
        return {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}

    # The Trainer's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the engine of the run, and refuse what cannot work."""
        self.engine = _shared_engine(trainer, pl_module)
        self.engine.setup(self.member, trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model."""
        self.engine.start_training(self.member, trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what is due before this epoch."""
        self.engine.start_epoch(self.member, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prune what is due before this step."""
        self.engine.start_batch(self.member, trainer, pl_module, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Gather scores."""
        self.member.strategy.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather scores."""
        self.member.strategy.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gather scores, or mask gradients."""
        self.member.strategy.before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End a batch."""
        self.engine.end_batch(self.member, trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was logged before."""
        self.engine.log.start_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write metrics into the history."""
        self.engine.end_validation(self.member, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        self.engine.end_training(self.member, trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove hooks, which Lightning leaves here, and report."""
        self.engine.stop(self.member, trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove hooks; warn if nothing was trained."""
        if stage == "fit":
            self.engine.log.warn_untrained(self.member, trainer)
        self.engine.teardown(self.member, trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Complete the checkpoint."""
        self.engine.save(self.member, trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the state of this callback, also where it pruned other parts of the model."""
        adopt_(self, checkpoint["callbacks"], pruning_callbacks(trainer))
        self.engine.load(self.member, trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save, as plain numbers and tensors."""
        return state_to_save(self.member, self.engine.log, self.engine.inputs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state."""
        restore_(self.member, self.engine.log, self.engine.inputs, state_dict)


def pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    """Return the trainer's callbacks that prune."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]  # type: ignore[attr-defined]


def engine_of(trainer: Trainer) -> Engine:
    """Return the engine that all pruning callbacks of a Trainer share once they are set up."""
    return pruning_callbacks(trainer)[0].engine


def pruned_so_far(trainer: Trainer) -> list[float]:
    """Return the share of its pruning steps that each callback has made: it differs where the model's size does."""
    return [callback.member.clock.progress for callback in pruning_callbacks(trainer)]


def pruning_finished(trainer: Trainer) -> bool:
    """Return whether no pruning step is to come."""
    return not any(callback.member.clock.unfinished for callback in pruning_callbacks(trainer))


def _shared_engine(trainer: Trainer, pl_module: LightningModule) -> Engine:
    """Return the engine of the first pruning callback, or a new one if that is of another run."""
    callbacks = pruning_callbacks(trainer)
    members, first = tuple(callback.member for callback in callbacks), callbacks[0].engine
    if first.members == members and first.is_of(pl_module):
        return first
    known = [callback.engine for callback in callbacks if callback.engine.is_of(pl_module)]
    earlier = max(known, key=lambda engine: len(engine.log.history.moments), default=None)
    return Engine(members, pl_module, earlier)
