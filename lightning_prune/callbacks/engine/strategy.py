"""Declares what a run calls of each way of pruning; decides neither when to prune nor what is logged."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.algorithms.schedules import Schedule
from lightning_prune.callbacks.engine.clock import Clock
from lightning_prune.callbacks.engine.example_inputs import RunInputs
from lightning_prune.callbacks.engine.expert_arguments import ExpertArguments
from lightning_prune.callbacks.engine.filter_arguments import FilterArguments
from lightning_prune.callbacks.engine.guard import companions
from lightning_prune.callbacks.engine.layer_arguments import LayerArguments
from lightning_prune.callbacks.engine.settings import compared_arguments
from lightning_prune.callbacks.engine.step import Traced
from lightning_prune.callbacks.engine.user_averages import UserAverages
from lightning_prune.callbacks.engine.weight_arguments import WeightArguments
from lightning_prune.pruning.plan import Plan
from lightning_prune.reports import Goal

__all__ = ["Coming", "Member", "Run", "RunEvents", "Strategy"]

_AMOUNTS = frozenset({
    "amount", "target", "scope", "round_to", "min_width", "max_amount", "uniform", "ignore", "module", "parameters",
    "pattern", "min_layers", "layers", "min_experts",
})  # fmt: skip
"""Arguments that say how much of what is pruned in the end."""

_Strategy = TypeVar("_Strategy", bound="Strategy")


@dataclass(frozen=True)
class Coming:
    """A pruning step to come: the progress that it reaches, its epoch or optimizer step, and the steps until then."""

    progress: float
    moment: int
    left: int


class RunEvents:
    """What happens in a run, for those who wait for it; each event is of interest to some."""

    def after_cut(self, run: Run, plan: Plan) -> None:
        """Follow a cut of the model, whoever made it."""

    def after_epoch_start(self, run: Run) -> None:
        """Start an epoch, after any pruning."""

    def before_backward(self, loss: Tensor) -> None:
        """Look at a loss before it is differentiated."""

    def after_backward(self, trainer: Trainer) -> None:
        """Look at the gradients of one backward pass."""

    def before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients that an optimizer is about to step by, before they are clipped."""

    def after_batch(self, run: Run) -> None:
        """End a training batch."""

    def after_epoch(self, run: Run) -> None:
        """End a training epoch."""

    def after_training(self, run: Run) -> None:
        """End training."""

    def before_save(self, run: Run, state: dict[str, Any]) -> None:
        """Change a state to save, which is this process's, into one that all processes can restore."""


class Strategy(RunEvents, ABC):
    """Base of the ways of pruning: what to do, while the engine says when.

    A strategy lives as long as its callback. What it knows of one run alone is dropped by :meth:`release`.
    """

    arguments: FilterArguments | LayerArguments | ExpertArguments | WeightArguments
    """What the user asked for."""
    example_inputs: Any = None
    """Inputs of forward that the user gave, if any."""
    traces: Traced = "forward"
    """What of the module runs on training batches; where forward takes none, a step does."""

    @abstractmethod
    def check_schedule(self, where: str, schedule: Schedule) -> None:
        """Refuse schedules that this way of pruning cannot follow, when the callback is made."""

    @abstractmethod
    def refuse(self, run: Run) -> None:
        """Refuse a run in which this way of pruning cannot work, before anything is set up."""

    @abstractmethod
    def prepare(self, run: Run, batch: Any | None) -> bool:
        """Find what can be pruned, and refuse amounts out of reach, before epochs are spent on them.

        Called without a batch when training starts; while that returns False, with every batch.
        """

    @abstractmethod
    def prune_to(self, run: Run, progress: float) -> None:
        """Prune up to the sparsity that the schedule asks for at ``progress``."""

    @abstractmethod
    def rollback_state(self) -> dict[str, Any]:
        """Return what the next pruning step changes of this strategy's own state."""

    @abstractmethod
    def rollback(self, run: Run, state: dict[str, Any]) -> None:
        """Follow a model that is as it was before the last pruning step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state to save, as plain numbers and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""

    @abstractmethod
    def reset(self) -> None:
        """Start anew, for another model."""

    @abstractmethod
    def release(self) -> None:
        """Remove every hook from the model and its optimizers."""

    # What a strategy may leave as it is

    fade_steps: int = 0
    """Optimizer steps before a pruning step over which what it removes is driven to zero."""
    needs_whole_model: bool = True
    """Whether it looks at a plain model where FSDP2 has split it."""

    def before_split(self, pl_module: LightningModule) -> None:
        """Look once more at a model that is whole for a pruning step, before it is split again."""

    def after_split(self) -> None:
        """Find the parameters anew, after the model was whole for a pruning step and split again."""

    def goal(self, run: Run) -> Goal | None:
        """Return what was asked and what is reached now, for the report."""
        return None

    @property
    def ready(self) -> bool:
        """Whether enough was seen to decide by."""
        return True

    @property
    def fading(self) -> float | None:
        """The progress of the pruning step whose units are being driven to zero, if any are."""
        return None

    def start_fade(self, run: Run, coming: Coming) -> None:
        """Select what the next pruning step removes, and begin to drive it to zero."""

    @property
    def units(self) -> int:
        """How many units are removed in all, for schedules that count them."""
        return 0

    def rehearse(self, run: Run, batch: Any) -> None:
        """Refuse a batch on which the module's steps would not run once all is pruned."""

    def reads_batches(self, pl_module: LightningModule) -> bool:
        """Return whether the model will be run on training batches beside the training."""
        return False

    @property
    def reads_losses(self) -> bool:
        """Whether the training step's loss will be asked for beside the training."""
        return False


@dataclass(eq=False)
class Member:
    """One pruning callback's part in a run.

    Attributes:
        callback: The callback, for messages.
        strategy: What it does.
        clock: When.
        module: The module that its state is of.
        prepared: Whether :meth:`Strategy.prepare` was done in this run.
        inputs_verified: Whether the model ran on a training batch, of those that it will run on.
        due_without_scores: Whether a pruning step is due and nothing was seen to decide by.
        held_back: Whether a pruning step had to wait for a guard in this run.
        asked_before: The arguments of the run that is resumed, until training starts under those of this one.
        resumed: Whether its state was restored from a checkpoint in this run.
    """

    callback: Callback
    strategy: Strategy
    clock: Clock
    module: weakref.ref[LightningModule] | None = None
    prepared: bool = False
    inputs_verified: bool = False
    due_without_scores: bool = False
    held_back: bool = False
    asked_before: dict[str, Any] | None = None
    resumed: bool = False

    @property
    def where(self) -> str:
        """The name of the callback, for messages."""
        return type(self.callback).__name__

    def start_run(self, pl_module: LightningModule) -> None:
        """Forget what belongs to the last run, and everything where that was of another module."""
        if self.module is None or self.module() is not pl_module:
            self.start_anew()
            self.module = weakref.ref(pl_module)
        self.strategy.release()
        self.clock.start_run()
        self.prepared = self.inputs_verified = self.due_without_scores = self.held_back = self.resumed = False

    def start_anew(self) -> None:
        """Forget what was pruned: the module is another, or has other weights now."""
        self.clock.reset()
        self.strategy.reset()
        self.asked_before = None

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments, as plain values: a resumed run may have others."""
        return compared_arguments(self.callback, None if self.module is None else self.module())

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The arguments that are others than in the run that is resumed: what they were, and what they are."""
        if self.asked_before is None:
            return {}
        now = self.asked
        return {name: (was, now[name]) for name, was in self.asked_before.items() if was != now[name]}

    @property
    def asks_for_other_amounts(self) -> bool:
        """Whether other arguments than in the run that is resumed say how much of what is pruned."""
        return not _AMOUNTS.isdisjoint(self.changes)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the model."""
        return {**self.__dict__, "module": None}

    @property
    def schedule(self) -> Schedule:
        """The schedule, once it is known how many units are removed in all."""
        return self.clock.schedule.over(self.strategy.units)


@dataclass(frozen=True, eq=False)
class Run:
    """What a strategy sees of the run that it is part of.

    Attributes:
        trainer: The Trainer.
        module: The module that it trains.
        members: All pruning callbacks, in their order.
        own: The one whose strategy is called.
        inputs: The run's example inputs.
        averages: The averages of weights that code of users keeps.
    """

    trainer: Trainer
    module: LightningModule
    members: tuple[Member, ...]
    own: Member
    inputs: RunInputs
    averages: UserAverages

    @property
    def where(self) -> str:
        """The name of the callback, for messages."""
        return self.own.where

    def strategies(self, kind: type[_Strategy]) -> list[_Strategy]:
        """Return the strategies of a kind, in the order of their callbacks."""
        return [member.strategy for member in self.members if isinstance(member.strategy, kind)]

    def before_step(self) -> None:
        """Announce to the callbacks beside ours that the model is about to change."""
        for companion in companions(self.trainer):
            companion.before_cut(self.trainer, self.module)
